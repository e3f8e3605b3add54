//! The scripts: one atomic step each, called by digest and loaded again when the server has forgotten them.
//!
//! Every queue script starts with `prelude.lua`, which refuses to touch anything if the server has lost the run's
//! data since the caller looked last.

use std::sync::LazyLock;

use redis::Script;

macro_rules! scripts {
    ($(($name:ident, $prelude:expr)),* $(,)?) => {
        /// All scripts, ready to be called.
        pub(super) struct Scripts {
            $(pub $name: Script,)*
        }

        pub(super) static SCRIPTS: LazyLock<Scripts> = LazyLock::new(|| Scripts {
            $($name: build(include_str!(concat!("scripts/", stringify!($name), ".lua")), $prelude),)*
        });
    };
}

const PRELUDE: &str = include_str!("scripts/prelude.lua");

scripts![
    (init, ""),
    (issue, PRELUDE),
    (lease, PRELUDE),
    (extend, PRELUDE),
    (delivered, PRELUDE),
    (put, PRELUDE),
    (finish, PRELUDE),
    (abandon, PRELUDE),
    (forward, PRELUDE),
    (acquire, PRELUDE),
    (renew, PRELUDE),
    (fetch, PRELUDE),
    (ack, PRELUDE),
    (report, PRELUDE),
    (outcomes, PRELUDE),
    (dead_letter, PRELUDE),
    (counts, PRELUDE),
    (get, PRELUDE),
    (set, PRELUDE),
    (set_progress, PRELUDE),
    (publish, ""),
    (latest, ""),
    (heartbeat, ""),
    (actors, ""),
    (collect, ""),
];

/// The `#!lua` line must stay the first.
fn build(source: &str, prelude: &str) -> Script {
    let (shebang, body) = source.split_once('\n').expect("a script has a first line");
    assert!(shebang.starts_with("#!lua"), "a script starts with its flags");
    Script::new(&format!("{shebang}\n{prelude}{body}"))
}
