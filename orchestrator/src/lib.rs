//! Freewheel: the whole system around its crates.
//!
//! ```text
//! config   one typed tree, every problem at once        cli      one file a command
//! prompts  prompt files, generator, the pool            run      wires the roles: one process, or one each
//! eval     held-out accuracy on the actor's engine      folder   what a run leaves on disk
//! report   the HTML report                              alarms   signs of a reward being gamed
//! hub      models by name, downloaded                    doctor   this machine, and what a config needs of it
//! ```
//!
//! Everything numeric lives in the crates below; nothing below knows of anything here.

pub mod alarms;
pub mod balance;
pub mod cli;
pub mod config;
pub mod cost;
pub mod evaluation;
pub mod folder;
pub mod hub;
pub mod images;
pub mod intervals;
pub mod lines;
pub mod logging;
pub mod policy;
pub mod prompts;
pub mod redteam;
pub mod report;
pub mod run;
pub mod signals;
