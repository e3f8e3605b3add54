//! Servers on the loopback that answer as a test says.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use freewheel_types::{Prompt, PromptBody, PromptId};

/// A server on the loopback; `serve` gets each request's head and body and the stream. Counts requests.
pub struct Server {
    pub url: String,
    pub asked: Arc<AtomicUsize>,
}

pub fn server(serve: impl Fn(usize, &str, &str, &mut TcpStream) + Send + Sync + 'static) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(AtomicUsize::new(0));
    let (counter, serve) = (Arc::clone(&asked), Arc::new(serve));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (Ok(mut stream), counter, serve) = (stream, Arc::clone(&counter), Arc::clone(&serve)) else {
                return;
            };
            std::thread::spawn(move || {
                let Some((head, body)) = request(&mut stream) else { return };
                serve(counter.fetch_add(1, Ordering::SeqCst), &head, &body, &mut stream);
            });
        }
    });
    Server { url, asked }
}

/// Head in lower case, and body.
pub fn request(stream: &mut impl Read) -> Option<(String, String)> {
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        if let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok())
                .unwrap_or(0);
            if bytes.len() >= end + 4 + length {
                return Some((head, String::from_utf8_lossy(&bytes[end + 4..]).into_owned()));
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
        }
    }
}

pub fn answer(stream: &mut impl Write, status: &str, body: &str) {
    let _ = write!(
        stream,
        "HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
}

pub fn fixed(status: &'static str, body: &'static str) -> Server {
    server(move |_, _, _, stream| answer(stream, status, body))
}

pub const FINE: &str = r#"{"data": [{"probs": [0.75]}]}"#;

pub fn prompt(answer: Option<&str>) -> Prompt {
    Prompt {
        id: PromptId::of(b"p"),
        name: None,
        body: PromptBody::Text("What is 3+4?".into()),
        answer: answer.map(|a| serde_json::to_string(a).unwrap()),
        tags: vec![],
        verifier: None,
        meta: None,
    }
}
