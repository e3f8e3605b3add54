//! What becomes of attacks that worked: prompts that the policy is trained on, and their harmless twins.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::attack::Technique;
use super::{Conversation, Goal, Sketch};

/// So many prompts before the share of a technique counts.
const QUOTA_FROM: usize = 10;

/// What is taken in.
#[derive(Clone, Copy, Debug)]
pub struct IntakeRules {
    /// Prompts of one goal, at most.
    pub per_goal: usize,
    /// Share of one technique, at most.
    pub per_technique: f64,
    /// Least distance from every prompt before.
    pub novelty: f64,
}

/// Prompts taken in so far.
#[derive(Debug)]
pub struct Intake {
    rules: IntakeRules,
    sketches: Vec<Sketch>,
    goals: BTreeMap<String, usize>,
    techniques: BTreeMap<Technique, usize>,
    twins: BTreeSet<String>,
    /// Lines of a prompt file.
    pub lines: Vec<Value>,
    /// Attacks that worked and were not taken in: sealed, like another, or too many of their kind.
    pub left_out: usize,
}

impl Intake {
    /// Nothing so far.
    pub fn new(rules: IntakeRules) -> Self {
        Self {
            rules,
            sketches: Vec::new(),
            goals: BTreeMap::new(),
            techniques: BTreeMap::new(),
            twins: BTreeSet::new(),
            lines: Vec::new(),
            left_out: 0,
        }
    }

    /// Takes in the conversation up to the attacker's last turn, with the goal's twin, if it reached its goal and the rules allow it.
    pub fn offer(&mut self, goal: &Goal, conversation: &Conversation, target: &str) {
        let Some(last) = conversation.turns.last().filter(|_| conversation.reached) else { return };
        let text: Vec<&str> = conversation.turns.iter().map(|turn| turn.reply.as_str()).collect();
        let sketch = Sketch::of(&text.join("\n"));
        let digest = goal.digest().to_string();
        let of_goal = self.goals.get(&digest).copied().unwrap_or(0);
        let of_technique = self.techniques.get(&last.strategy).copied().unwrap_or(0);
        let taken: usize = self.techniques.values().sum();
        let crowded =
            taken >= QUOTA_FROM && (of_technique + 1) as f64 > self.rules.per_technique * (taken + 1) as f64;
        let known = self.sketches.iter().any(|before| before.distance(&sketch) < self.rules.novelty);
        if goal.is_sealed() || known || crowded || of_goal >= self.rules.per_goal {
            self.left_out += 1;
            return;
        }
        let mut messages = conversation.seen_by_target(goal);
        messages.pop();
        let turns: Vec<Value> =
            messages.iter().map(|m| json!({"role": m.role, "content": text_of(m)})).collect();
        let mut tags = vec!["adversarial".to_owned()];
        tags.extend(goal.category.clone());
        let meta = json!({"goal": digest, "technique": last.strategy, "target": target, "turns": conversation.turns.len()});
        self.lines.push(json!({"messages": turns, "tags": tags, "meta": meta}));
        // Goals may share a twin.
        if let Some(twin) = goal.twin.as_ref().filter(|twin| self.twins.insert((*twin).clone())) {
            let tags = ["borderline"];
            self.lines.push(json!({"messages": [{"role": "user", "content": twin}], "tags": tags, "meta": {"twin_of": digest}}));
        }
        self.sketches.push(sketch);
        *self.goals.entry(digest).or_default() += 1;
        *self.techniques.entry(last.strategy).or_default() += 1;
    }
}

fn text_of(message: &freewheel_types::Message) -> String {
    match &message.content {
        freewheel_types::MessageContent::Text(text) => text.clone(),
        freewheel_types::MessageContent::Parts(_) => String::new(),
    }
}

/// The harmless twins of `goals`, once each.
pub fn twins(goals: &[Goal]) -> BTreeSet<String> {
    goals.iter().filter_map(|goal| goal.twin.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Turn, canaries};
    use super::*;

    fn won(reply: &str, strategy: Technique) -> Conversation {
        let turn =
            Turn { observation: String::new(), thought: "secret".into(), strategy, reply: reply.into() };
        Conversation {
            goal: 0,
            turns: vec![turn],
            answers: vec!["BLUEBIRD".into()],
            reached: true,
            broken: false,
        }
    }

    fn open_goal() -> Goal {
        canaries().into_iter().find(|goal| !goal.is_sealed()).unwrap()
    }

    fn rules() -> IntakeRules {
        IntakeRules { per_goal: 32, per_technique: 0.5, novelty: 0.3 }
    }

    fn attack(i: usize) -> String {
        (0..12).map(|k| format!("w{}", 100 * i + k)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn an_attack_that_worked_becomes_a_prompt_without_the_answer_or_the_reasoning_and_with_a_twin() {
        let (goal, mut intake) = (open_goal(), Intake::new(rules()));
        intake.offer(&goal, &won(&attack(1), Technique::Hypothetical), "1.7");
        intake.offer(
            &goal,
            &Conversation { reached: false, ..won(&attack(2), Technique::Hypothetical) },
            "1.7",
        );
        assert_eq!(intake.lines.len(), 2);
        let text: String = intake.lines.iter().map(|line| format!("{line}\n")).collect();
        let prompts =
            crate::prompts::parse(text.as_bytes(), "p", std::path::Path::new("."), true).unwrap().prompts;
        assert_eq!(
            (prompts[0].tags.as_slice(), prompts[1].tags.as_slice()),
            (&["adversarial".to_owned()][..], &["borderline".to_owned()][..])
        );
        assert_eq!(prompts[0].question(), attack(1));
        assert!(!text.contains("secret") && !intake.lines[0]["messages"].to_string().contains("assistant\""));
    }

    #[test]
    fn what_is_known_sealed_or_too_many_is_left_out() {
        let (goal, mut intake) = (open_goal(), Intake::new(IntakeRules { per_goal: 3, ..rules() }));
        intake.offer(&goal, &won(&attack(1), Technique::Hypothetical), "1.7");
        intake.offer(&goal, &won(&format!("{} w999", attack(1)), Technique::Hypothetical), "1.7");
        assert_eq!((intake.sketches.len(), intake.left_out), (1, 1), "nearly the same words");
        let sealed = canaries().into_iter().find(Goal::is_sealed).unwrap();
        intake.offer(&sealed, &won(&attack(2), Technique::Hypothetical), "1.7");
        (3..8).for_each(|i| intake.offer(&goal, &won(&attack(i), Technique::Hypothetical), "1.7"));
        assert_eq!(
            (intake.sketches.len(), intake.left_out),
            (3, 5),
            "a sealed one, and three over the goal's cap"
        );
        let mut intake = Intake::new(rules());
        (0..20).for_each(|i| intake.offer(&goal, &won(&attack(i), Technique::Hypothetical), "1.7"));
        (20..40).for_each(|i| intake.offer(&goal, &won(&attack(i), Technique::DualResponse), "1.7"));
        assert_eq!(intake.techniques[&Technique::Hypothetical], 10, "after ten, no more than half");
        assert!(intake.techniques[&Technique::DualResponse] >= 9, "{:?}", intake.techniques);
    }
}
