//! Reward servers that behave, and servers that hang, lie, dawdle, flood or send elsewhere: no wrong reward, no stall.

mod support;

use std::io::Write;
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use freewheel_reward::{
    Backend, Completion, ComponentConfig, ComponentKind, Ensemble, JudgeMode, RemoteConfig, RewardConfig,
    RewardStack,
};
use freewheel_types::{RewardRecord, Verdict};
use support::{FINE, Server, answer, fixed, prompt, server};

fn stack(remote: RemoteConfig, deadline_ms: u64) -> RewardStack {
    let remote = RemoteConfig { model: "rm".into(), ..remote };
    let component = ComponentConfig {
        name: "help".into(),
        kind: ComponentKind::Remote,
        remote: Some(remote),
        ..Default::default()
    };
    RewardStack::new(&RewardConfig { component: vec![component], deadline_ms, ..Default::default() })
        .expect("usable")
}

fn score(stack: &RewardStack, text: &str) -> RewardRecord {
    stack.score(&Completion { prompt: &prompt(Some("7")), text, tokens: 1, truncated: false })
}

fn to(server: &Server) -> RemoteConfig {
    RemoteConfig { urls: vec![server.url.clone()], ..RemoteConfig::default() }
}

/// The reason of an unscored record, and that it came within the deadline.
#[track_caller]
fn unscored(remote: RemoteConfig, deadline_ms: u64) -> String {
    let stack = stack(remote, deadline_ms);
    let begin = Instant::now();
    let record = score(&stack, "7");
    let took = begin.elapsed();
    assert!(
        took <= Duration::from_millis(deadline_ms + 250),
        "took {took:?} with deadline_ms = {deadline_ms}"
    );
    match record.verdict {
        Verdict::Unscored { reason } => reason,
        scored => panic!("a reward from a server like this: {scored:?}"),
    }
}

#[test]
fn a_score_arrives_with_its_version_and_the_same_question_is_asked_once() {
    let server = server(|_, head, body, stream| {
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let fine = head.starts_with("post /classify")
            && body["use_activation"] == false
            && body["messages"][1]["content"] == "7";
        answer(stream, "200 OK", if fine { FINE } else { "{}" });
    });
    let stack = stack(to(&server), 5000);
    for _ in 0..3 {
        let record = score(&stack, "7");
        assert_eq!(record.reward(), Some(0.75), "{:?}", record.verdict);
        assert_eq!(record.components[0].version.as_deref(), Some("vllm_classify:rm"));
    }
    assert_eq!(server.asked.load(Ordering::SeqCst), 1);
}

#[test]
fn hung_slow_huge_redirecting_and_garbage_servers_give_no_reward_and_no_stall() {
    let hung = server(|_, _, _, _| std::thread::sleep(Duration::from_secs(20)));
    assert!(unscored(to(&hung), 600).contains("help: "));
    // A byte every 20 ms, for ever.
    let slow = server(|_, _, _, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n");
        while stream.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    unscored(to(&slow), 600);
    let huge = server(|_, _, _, stream| {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n");
        while stream.write_all(&[b'['; 65536]).is_ok() {}
    });
    assert!(unscored(to(&huge), 3000).contains("longer than"));
    let elsewhere = fixed("200 OK", FINE);
    let location = elsewhere.url.clone();
    let redirecting = server(move |_, _, _, stream| {
        let _ = write!(
            stream,
            "HTTP/1.1 307 Moved\r\nlocation: {location}/classify\r\ncontent-length: 0\r\n\r\n"
        );
    });
    assert!(unscored(to(&redirecting), 3000).contains("redirects are refused"));
    assert_eq!(elsewhere.asked.load(Ordering::SeqCst), 0, "it was followed");
    for garbage in [
        "",
        "<html>",
        "{}",
        "{\"data\": [{\"probs\": [\"NaN\"]}]}",
        "{\"data\": [{\"probs\": [1e999]}]}",
        "{\"data\": [{\"probs\": [1",
    ] {
        let server = server(move |_, _, _, stream| answer(stream, "200 OK", garbage));
        unscored(to(&server), 3000);
    }
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gone = RemoteConfig { urls: vec![format!("http://{gone}")], ..RemoteConfig::default() };
    assert!(unscored(gone, 3000).contains("3 attempts"));
}

#[test]
fn a_server_that_stumbles_is_asked_again_one_that_refuses_is_not() {
    let stumbling = server(|n, _, _, stream| {
        answer(stream, if n < 2 { "503 Busy" } else { "200 OK" }, FINE);
    });
    assert_eq!(score(&stack(to(&stumbling), 5000), "7").reward(), Some(0.75));
    assert_eq!(stumbling.asked.load(Ordering::SeqCst), 3);
    let refusing = fixed("401 Unauthorized", "{}");
    assert!(unscored(to(&refusing), 5000).contains("status 401"));
    assert_eq!(refusing.asked.load(Ordering::SeqCst), 1);
}

#[test]
fn a_server_that_keeps_failing_is_left_alone_for_a_while() {
    let broken = fixed("500 Broken", "{}");
    let stack = stack(RemoteConfig { retries: 0, ..to(&broken) }, 2000);
    let reasons: Vec<String> = (0..8)
        .map(|i| match score(&stack, &i.to_string()).verdict {
            Verdict::Unscored { reason } => reason,
            scored => panic!("{scored:?}"),
        })
        .collect();
    assert_eq!(broken.asked.load(Ordering::SeqCst), 5);
    assert!(reasons[7].contains("not asked again"), "{reasons:?}");
}

#[test]
fn an_ensemble_is_mean_less_deviations_and_needs_all_its_members() {
    let (a, b) = (
        fixed("200 OK", r#"{"data": [{"probs": [1.0]}]}"#),
        fixed("200 OK", r#"{"data": [{"probs": [3.0]}]}"#),
    );
    let urls = vec![a.url.clone(), b.url.clone()];
    let both =
        |ensemble| RemoteConfig { urls: urls.clone(), ensemble, ensemble_k: 0.5, ..RemoteConfig::default() };
    for (ensemble, expected) in [(Ensemble::MeanMinusStd, 1.5), (Ensemble::Min, 1.0), (Ensemble::Mean, 2.0)] {
        assert_eq!(score(&stack(both(ensemble), 5000), "7").reward(), Some(expected));
    }
    let broken = fixed("404 Gone", "{}");
    let partly = RemoteConfig { urls: vec![a.url.clone(), broken.url.clone()], ..RemoteConfig::default() };
    assert!(unscored(partly, 3000).contains("status 404"));
}

#[test]
fn the_rate_is_kept_and_what_has_no_turn_is_unscored() {
    let server = fixed("200 OK", FINE);
    let stack = stack(RemoteConfig { rate_per_s: Some(20.0), ..to(&server) }, 400);
    let begin = Instant::now();
    for i in 0..5 {
        assert!(score(&stack, &i.to_string()).reward().is_some());
    }
    assert!(begin.elapsed() >= Duration::from_millis(190), "{:?}", begin.elapsed());
}

fn judge(mode: JudgeMode, server: &Server) -> RemoteConfig {
    RemoteConfig { backend: Backend::Judge, judge: mode, rubric: "Is it right?".into(), ..to(server) }
}

#[test]
fn judges_grade_as_json_by_log_probs_and_in_both_orders() {
    let grading = server(|_, head, body, stream| {
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert!(
            head.starts_with("post /v1/chat/completions") && body["response_format"]["type"] == "json_schema"
        );
        answer(
            stream,
            "200 OK",
            r#"{"choices": [{"message": {"content": "{\"reason\": \"so\", \"score\": 7}"}}]}"#,
        );
    });
    let record = score(&stack(judge(JudgeMode::Score, &grading), 5000), "7");
    assert_eq!((record.reward(), record.components[0].detail.as_deref()), (Some(0.75), Some("so")));
    let top = |entries: &[(&str, f64)]| {
        let list: Vec<_> =
            entries.iter().map(|(t, p)| serde_json::json!({"token": t, "logprob": p.ln()})).collect();
        serde_json::json!({"choices": [{"logprobs": {"content": [{"top_logprobs": list}]}}]}).to_string()
    };
    let weighing = top(&[("9", 0.5), ("5", 0.25), (" 1", 0.125), ("x", 0.125)]);
    let weighing = server(move |_, _, _, stream| answer(stream, "200 OK", &weighing));
    let expected = (0.5 + 0.25 * 0.5) / 0.875;
    let got = score(&stack(judge(JudgeMode::Logprobs, &weighing), 5000), "7").reward().unwrap();
    assert!((got - expected as f32).abs() <= 1e-6, "{got}");
    let unsure = top(&[("I", 0.9), ("9", 0.05)]);
    let unsure = server(move |_, _, _, stream| answer(stream, "200 OK", &unsure));
    assert!(unscored(judge(JudgeMode::Logprobs, &unsure), 3000).contains("only 5 %"));
    // Prefers whatever comes first: both orders together make it a draw.
    let biased = top(&[("A", 0.9), ("B", 0.1)]);
    let biased = server(move |_, _, _, stream| answer(stream, "200 OK", &biased));
    let got = score(&stack(judge(JudgeMode::Pair, &biased), 5000), "seven").reward().unwrap();
    assert!((got - 0.5).abs() <= 1e-6, "{got}");
    assert_eq!(biased.asked.load(Ordering::SeqCst), 2);
    for wrong in ["Score: 7", "{\\\"score\\\": 12}", "{\\\"score\\\": \\\"7\\\"}", "7"] {
        let body = format!("{{\"choices\": [{{\"message\": {{\"content\": \"{wrong}\"}}}}]}}");
        let server = server(move |_, _, _, stream| answer(stream, "200 OK", &body));
        unscored(judge(JudgeMode::Score, &server), 3000);
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let remote = RemoteConfig {
        urls: vec!["ftp://x".into()],
        timeout_ms: 0,
        scale: [5, 5],
        ..RemoteConfig::default()
    };
    let component = ComponentConfig {
        name: "help".into(),
        kind: ComponentKind::Remote,
        remote: Some(remote),
        ..Default::default()
    };
    let config = RewardConfig { component: vec![component], ..Default::default() };
    let problems = RewardStack::check(&config).expect_err("refused");
    let keys: Vec<_> = problems.iter().map(|p| p.key.as_str()).collect();
    for key in ["urls", "model", "timeout_ms", "scale"] {
        let key = format!("reward.component[0].remote.{key}");
        assert!(keys.contains(&key.as_str()), "{key} is missing from {keys:?}");
    }
}
