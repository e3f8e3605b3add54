//! Guessed tokens: what came after the last few tokens when they last appeared, in the prompt or in the completion itself
//! (prompt lookup decoding, Saxena 2023; n-gram speculation).
//!
//! A step computes the guesses along with the token they follow, and draws after each of them with the random number that the
//! token at that place has anyway. As long as what is drawn is what was guessed, the next row's logits are the right ones;
//! the first difference ends it. So the tokens are those that would have been drawn one by one, and only their number in a
//! step changes. (Sampling by rejection, Leviathan et al. 2023, arXiv:2211.17192, keeps the distribution; numbers keyed by
//! place keep the tokens.)
//!
//! How much to guess is learnt from how guessing went, sample by sample; the counts decide, no clock does.

/// How many tokens must agree before a guess is made: first three, then two.
const MATCHES: [usize; 2] = [3, 2];
/// Most tokens guessed at once.
const LEN_MAX: usize = 15;
/// How far back to look, tokens.
const WINDOW: usize = 2048;
/// Tokens drawn without guessing after guessing has failed; doubles with each failure.
const REST: u32 = 16;
const REST_MAX: u32 = 256;

/// What one sample learnt about guessing.
#[derive(Clone, Debug)]
pub(crate) struct Drafter {
    /// Tokens to guess.
    len: usize,
    /// Tokens to draw before the next guess.
    rest: u32,
    /// Length of the next rest.
    next_rest: u32,
}

impl Default for Drafter {
    fn default() -> Self {
        Self { len: 2, rest: 0, next_rest: REST }
    }
}

impl Drafter {
    /// What may follow `prompt` and `output`: at most `most` tokens, none if guessing does not pay at present.
    pub(crate) fn guess(&self, prompt: &[u32], output: &[u32], most: usize) -> Vec<u32> {
        let most = most.min(self.len);
        if self.rest > 0 || most == 0 {
            return Vec::new();
        }
        let from_output = output.len().min(WINDOW);
        let from_prompt = prompt.len().min(WINDOW - from_output);
        let ids = [&prompt[prompt.len() - from_prompt..], &output[output.len() - from_output..]].concat();
        for n in MATCHES {
            let Some(before) = ids.len().checked_sub(n) else { continue };
            let end = &ids[before..];
            // The last place but the end itself.
            let earlier = ids[..ids.len() - 1].windows(n).rposition(|window| window == end);
            if let Some(at) = earlier {
                // Past the end it goes on with what was guessed: repetition goes on repeating.
                let mut guess: Vec<u32> = Vec::with_capacity(most);
                for place in at + n..at + n + most {
                    guess.push(ids.get(place).copied().unwrap_or_else(|| guess[place - ids.len()]));
                }
                return guess;
            }
        }
        Vec::new()
    }

    /// `drawn` tokens came of a step that had guessed `guessed`, the first `right` of them as drawn.
    pub(crate) fn learn(&mut self, guessed: usize, right: usize, drawn: usize) {
        self.rest = self.rest.saturating_sub(drawn as u32);
        if guessed == 0 {
            return;
        }
        if right == guessed {
            self.len = (2 * self.len).min(LEN_MAX);
            self.next_rest = REST;
        } else if 2 * right < guessed || right == 0 {
            self.len /= 2;
        }
        if self.len == 0 {
            self.len = 1;
            self.rest = self.next_rest;
            self.next_rest = (2 * self.next_rest).min(REST_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_continuation_of_the_longest_match_is_guessed() {
        let drafter = Drafter { len: 4, ..Drafter::default() };
        let guess = |prompt: &[u32], output: &[u32], most| drafter.guess(prompt, output, most);
        assert_eq!(guess(&[1, 2, 3, 4, 5, 6], &[9, 1, 2, 3], 3), [4, 5, 6]);
        assert_eq!(guess(&[1, 2, 3, 4, 1, 2, 3, 5], &[1, 2, 3], 1), [5]);
        assert_eq!(guess(&[8, 2, 3, 7], &[9, 2, 3], 8), [7, 9, 2, 3], "two tokens will do");
        assert_eq!(guess(&[5, 6, 5], &[6], 3), [5, 6, 5], "what repeats goes on repeating");
        assert_eq!(guess(&[1, 2, 3], &[4], 4), [0; 0]);
        assert_eq!(guess(&[1], &[], 4), [0; 0]);
        assert_eq!(guess(&[1, 2, 3, 1, 2], &[], 0), [0; 0]);
    }

    #[test]
    fn guessing_grows_where_it_pays_and_rests_where_it_fails() {
        let mut drafter = Drafter::default();
        drafter.learn(2, 2, 3);
        drafter.learn(4, 4, 5);
        drafter.learn(8, 8, 9);
        assert_eq!(drafter.guess(&[1; 40], &[], 20), [1; LEN_MAX]);
        (0..4).for_each(|_| drafter.learn(1, 0, 1));
        assert!(drafter.guess(&[1; 40], &[], 20).is_empty(), "it rests");
        (0..REST).for_each(|_| drafter.learn(0, 0, 1));
        assert_eq!(drafter.guess(&[1; 40], &[], 20).len(), 1, "and tries again");
        drafter.learn(1, 0, 1);
        (0..REST).for_each(|_| drafter.learn(0, 0, 1));
        assert!(drafter.guess(&[1; 40], &[], 20).is_empty(), "the second rest is longer");
    }
}
