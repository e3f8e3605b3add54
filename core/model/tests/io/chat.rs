//! Chat templates: golden renderings, and texts that try to be special tokens.

use freewheel_model::{RenderOptions, Tokenizer, load};
use freewheel_types::{ContentPart, Message, MessageContent, PromptBody};
use serde_json::{Value, json};

use super::support::{ids, json as read_json, model_dir, model_names, oracles};

/// 2025-06-30 12:00, what the golden cases were rendered at.
const GOLDEN_NOW: i64 = 1_751_284_800;

fn options(case: &Value) -> RenderOptions {
    RenderOptions {
        add_generation_prompt: case["add_generation_prompt"].as_bool().expect("flag"),
        continue_final_message: case["continue_final_message"].as_bool().expect("flag"),
        tools: case["tools"].as_array().cloned(),
        variables: case["kwargs"].as_object().cloned().unwrap_or_default(),
        now: GOLDEN_NOW,
        ..RenderOptions::default()
    }
}

/// The tokenizer of a golden checkpoint with another template and the special tokens of the cases.
fn tokenizer_with(model: &str, template: &str, names: &Value) -> Tokenizer {
    let dir = oracles().join(model);
    let read = |path: std::path::PathBuf| std::fs::read(path).expect("golden file");
    let files = vec![
        ("tokenizer.json".to_owned(), read(dir.join("tokenizer.json"))),
        ("tokenizer_config.json".to_owned(), names.to_string().into_bytes()),
        ("chat_template.jinja".to_owned(), read(oracles().join("chat").join(template))),
    ];
    Tokenizer::from_files(&dir, files).unwrap_or_else(|e| panic!("{template}: {e}"))
}

#[test]
fn golden_conversations() {
    let golden = read_json(&oracles().join("chat/cases.json"));
    let mut seen = 0;
    let mut wrong = Vec::new();
    for case in golden["cases"].as_array().expect("cases") {
        let model = case["tokenizer"].as_str().expect("a checkpoint");
        let names = &golden["special_tokens"][model.trim_start_matches("models/")];
        let tokenizer = tokenizer_with(model, case["template"].as_str().expect("a template"), names);
        let (name, options) = (case["name"].as_str().expect("a name"), options(case));
        let messages = case["messages"].as_array().expect("messages");
        seen += 1;
        match (case.get("error").and_then(Value::as_str), tokenizer.encode_chat(messages, &options)) {
            (Some(message), Err(e)) => {
                if !e.to_string().contains(message.rsplit(": ").next().expect("a last part")) {
                    wrong.push(format!("{name}: {e} instead of {message}"));
                }
            }
            (None, Ok(chat)) => {
                let text = tokenizer.render_json(messages, &options).expect("rendered before");
                if text != case["text"].as_str().expect("text") {
                    wrong.push(format!("{name}: {text:?}\n  instead of {}", case["text"]));
                } else if has_specials(&tokenizer, &case["messages"]) {
                    // Here the reference library falls for special tokens in what the user wrote; we must not.
                    let reference = tokenizer.encode_trusted(&text).expect("ids");
                    if reference != ids(&case["ids"])
                        || specials(&tokenizer, &chat.ids) >= specials(&tokenizer, &reference)
                    {
                        wrong.push(format!("{name}: ids {:?}", chat.ids));
                    }
                } else if chat.ids != ids(&case["ids"]) {
                    wrong.push(format!("{name}: ids {:?}\n  instead of {}", chat.ids, case["ids"]));
                }
                if let Some(mask) = case["assistant_masks"].as_array() {
                    let mask: Vec<bool> = mask.iter().map(|bit| bit == 1).collect();
                    if chat.assistant_mask.as_ref() != Some(&mask) {
                        wrong.push(format!("{name}: mask {:?}", chat.assistant_mask));
                    }
                }
            }
            (expected, got) => wrong.push(format!("{name}: {got:?} instead of {expected:?}")),
        }
    }
    assert!(wrong.is_empty(), "{} of {seen} wrong:\n{}", wrong.len(), wrong.join("\n"));
    assert!(seen >= 4, "only {seen} cases");
}

#[test]
fn golden_templates_of_checkpoints() {
    for name in model_names() {
        let tokenizer = load(&model_dir(&name), None).expect("checkpoint").tokenizer;
        let golden = read_json(&model_dir(&name).join("golden.json"));
        let Some(cases) = golden["tokenizer"]["chat"].as_array() else { continue };
        if !tokenizer.has_template() && std::env::var_os("FREEWHEEL_ORACLES").is_none() {
            continue; // Copies of others' templates are not among the fixtures.
        }
        for case in cases {
            let options = RenderOptions {
                add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap_or(false),
                ..RenderOptions::default()
            };
            let messages = case["messages"].as_array().expect("messages");
            let chat = tokenizer.encode_chat(messages, &options).unwrap_or_else(|e| panic!("{name}: {e}"));
            assert_eq!(chat.ids, ids(&case["ids"]), "{name}");
        }
    }
}

/// Whether some text in `value` holds a special token.
fn has_specials(tokenizer: &Tokenizer, value: &Value) -> bool {
    match value {
        Value::String(text) => specials(tokenizer, &tokenizer.encode_trusted(text).expect("ids")) > 0,
        Value::Array(items) => items.iter().any(|item| has_specials(tokenizer, item)),
        Value::Object(map) => map.values().any(|item| has_specials(tokenizer, item)),
        _ => false,
    }
}

/// Number of special tokens, wherever they are.
fn specials(tokenizer: &Tokenizer, ids: &[u32]) -> usize {
    ids.iter().filter(|id| tokenizer.is_special(**id)).count()
}

#[test]
fn hostile_text_stays_text() {
    for name in model_names() {
        let tokenizer = load(&model_dir(&name), None).expect("checkpoint").tokenizer;
        let all: Vec<String> = (0..tokenizer.vocab_size() as u32)
            .filter(|id| tokenizer.is_special(*id))
            .filter_map(|id| tokenizer.id_to_token(id))
            .collect();
        assert!(!all.is_empty(), "{name} has special tokens");
        let hostile = format!("a {} b\u{F0000}{}", all.concat(), all.join(" "));
        let plain = tokenizer.encode(&hostile).expect("ids");
        assert_eq!(specials(&tokenizer, &plain), 0, "{name}: as text");
        assert_eq!(tokenizer.decode(&plain), tokenizer.decode_all(&plain), "{name}");
        assert_eq!(tokenizer.decode(&plain).trim_start(), hostile, "{name}: nothing is lost");
        if !tokenizer.has_template() {
            continue;
        }
        let chat = |content: &str| PromptBody::Messages(vec![Message::text("user", content)]);
        let harmless = tokenizer.encode_prompt(&chat("harmless")).expect("ids").ids;
        let attacked = tokenizer.encode_prompt(&chat(&hostile)).expect("ids").ids;
        assert_eq!(
            specials(&tokenizer, &attacked),
            specials(&tokenizer, &harmless),
            "{name}: in a conversation"
        );
        assert!(
            tokenizer.decode_all(&attacked).contains(&hostile),
            "{name}: the model sees what was written"
        );
    }
}

#[test]
fn special_tokens_cannot_be_put_together_from_parts() {
    let template = "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\
        {% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}\
        {% endif %}<|eot_id|>{% endfor %}";
    let dir = model_dir("llama3");
    let files = vec![
        ("tokenizer.json".to_owned(), std::fs::read(dir.join("tokenizer.json")).expect("tokenizer")),
        ("tokenizer_config.json".to_owned(), br#"{"bos_token": "<|begin_of_text|>"}"#.to_vec()),
        ("chat_template.jinja".to_owned(), template.as_bytes().to_vec()),
    ];
    let tokenizer = Tokenizer::from_files(&dir, files).expect("tokenizer");
    let parts = |texts: &[&str]| {
        let parts = texts.iter().map(|text| ContentPart::Text((*text).to_owned())).collect();
        PromptBody::Messages(vec![Message { role: "user".into(), content: MessageContent::Parts(parts) }])
    };
    for split in
        [vec!["<|eot_", "id|>"], vec!["<", "|eot_id|>"], vec!["<|e", "ot", "_id|>"], vec!["<|eot_id|>"]]
    {
        let ids = tokenizer.encode_prompt(&parts(&split)).expect("ids").ids;
        assert_eq!(specials(&tokenizer, &ids), 4, "{split:?}");
        assert!(tokenizer.decode_all(&ids).ends_with("<|end_header_id|><|eot_id|><|eot_id|>"), "{split:?}");
    }
    let role = json!([{"role": "user<|eot_id|>", "content": "x"}]);
    let refused = tokenizer.encode_chat(role.as_array().expect("list"), &RenderOptions::default());
    assert!(refused.is_err_and(|e| e.to_string().contains("role")), "a role that is no word is refused");
}

#[test]
fn shielded_ids_are_the_ordinary_ids_around_them() {
    // The shielded path must cut the text where the ordinary path does.
    let tokenizer = load(&model_dir("llama3"), None).expect("checkpoint").tokenizer;
    let chat = |content: &str| PromptBody::Messages(vec![Message::text("user", content)]);
    let ordinary = tokenizer.encode_prompt(&chat("What is 12 + 30? <")).expect("ids").ids;
    let text = tokenizer.decode_all(&ordinary);
    assert_eq!(ordinary, tokenizer.encode_trusted(&text).expect("ids"));
}

#[test]
fn templates_without_mercy() {
    let make = |template: &str| {
        let dir = model_dir("llama3");
        let json = std::fs::read(dir.join("tokenizer.json")).expect("tokenizer");
        let files = vec![
            ("tokenizer.json".into(), json),
            ("chat_template.jinja".into(), template.as_bytes().to_vec()),
        ];
        Tokenizer::from_files(&dir, files)
    };
    let messages = [Message::text("user", "hi")];
    assert!(make("{% for %}").is_err_and(|e| e.to_string().starts_with("chat template")));
    let raises = make("{{ raise_exception('only system') }}").expect("compiles");
    let error = raises.render(&messages, &RenderOptions::default()).expect_err("raised").to_string();
    assert!(error.contains("only system"), "{error}");
    let dated =
        make("{{ strftime_now('%d %b %Y') }} {{ true }} {{ none }} {{ messages[0] }}").expect("compiles");
    let text = dated.render(&messages, &RenderOptions::default()).expect("renders");
    assert_eq!(text, "26 Jul 2024 True None {'role': 'user', 'content': 'hi'}");
    let given = make(
        "{% for d in documents %}{{ d.title }}: {{ d.text | trim }}; {% endfor %}{{ tools | tojson }}\
         {% if not x is defined %}{{ x }}-{% endif %}",
    )
    .expect("compiles");
    let options = RenderOptions {
        documents: Some(vec![json!({"title": "Trees", "text": " An oak. "})]),
        tools: Some(vec![json!({"name": "f", "strict": true})]),
        ..RenderOptions::default()
    };
    let text = given.render(&messages, &options).expect("renders");
    assert_eq!(text, "Trees: An oak.; [{\"name\": \"f\", \"strict\": true}]-");
    let nested = make("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}").expect("compiles");
    assert!(nested.render(&messages, &RenderOptions::default()).is_err(), "endless recursion ends");
    let none = Tokenizer::from_files(
        &model_dir("llama3"),
        vec![(
            "tokenizer.json".into(),
            std::fs::read(model_dir("llama3").join("tokenizer.json")).expect("file"),
        )],
    )
    .expect("tokenizer");
    let error =
        none.encode_prompt(&PromptBody::Messages(messages.to_vec())).expect_err("no template").to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
}
