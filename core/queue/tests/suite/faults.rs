//! What only a server can do to us: die, forget, fill up, damage, answer too late.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use freewheel_queue::redis::managed::ManagedServer;
use freewheel_queue::redis::{RedisQueue, RedisStore, inspect};
use freewheel_queue::{
    DeliveryBody, PolicyStore, PutOutcome, QueueConfig, QueueError, QueueSecret, RolloutQueue,
};
use freewheel_types::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::bench::*;

async fn bench() -> Option<RedisBench> {
    Some(Bench::redis(&config()).await?.into_redis())
}

/// A bench whose server may be harmed.
async fn own_bench() -> Option<RedisBench> {
    Some(Bench::on(Server::start()?, &config()).await.into_redis())
}

fn run() -> RunId {
    "faults".parse().expect("a name")
}

#[tokio::test]
async fn a_wiped_server_is_noticed_and_set_up_again() {
    let Some(bench) = own_bench().await else { return };
    let (queue, task) = (&bench.queue, task(1, 1));
    let other = RedisQueue::connect(&bench.url, &bench.run, &bench.config).await.unwrap();
    queue.issue(&task).await.unwrap();
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let store = RedisStore::connect(&bench.url, &bench.run, &bench.config).await.unwrap();
    let _: String = bench.ask(&["FLUSHALL"]).await;

    let lost = |result: Result<(), QueueError>| {
        assert!(matches!(result, Err(QueueError::DataLost { .. })), "{result:?}")
    };
    lost(queue.issue(&task).await);
    lost(queue.counts().await.map(drop));
    lost(queue.fetch_scored(epoch, 1, NOW).await.map(drop));
    lost(queue.renew_learner("learner", epoch).await);
    lost(queue.put_rollout(&rollout(&task, 0)).await.map(drop));
    lost(other.lease_tasks(&actor("a"), 1, Duration::from_secs(9)).await.map(drop));
    lost(store.publish(epoch, &weights(PolicyVersion::new(epoch, 1), None, 9)).await);

    // A newcomer sets up the streams, but the pool must hear of the loss before it goes on.
    let newcomer = RedisQueue::connect(&bench.url, &bench.run, &bench.config).await.unwrap();
    lost(queue.counts().await.map(drop));
    assert_eq!(queue.counts().await.unwrap().issued, 0, "joined by itself");
    lost(queue.issue(&task).await);
    lost(queue.outcomes(1, NOW).await.map(drop));
    queue.reinit().await.unwrap();
    queue.issue(&task).await.unwrap();
    assert_eq!(newcomer.lease_tasks(&actor("a"), 1, NOW).await.unwrap()[0].task, task);

    // The other roles only try again; the learner keeps its epoch.
    newcomer.put_scored(&scored(rollout(&task, 0), 1.0)).await.unwrap();
    lost(other.fetch_scored(epoch, 1, NOW).await.map(drop));
    lost(other.fetch_scored(epoch, 1, NOW).await.map(drop));
    other.renew_learner("learner", epoch).await.unwrap();
    assert_eq!(other.fetch_scored(epoch, 1, NOW).await.unwrap().len(), 1);
    store.publish(epoch, &weights(PolicyVersion::new(epoch, 1), None, 9)).await.unwrap();
    assert_eq!(other.acquire_learner("second", 0).await.unwrap(), None, "the lease lives again");
}

#[tokio::test]
async fn forgotten_scripts_are_loaded_again() {
    let Some(bench) = bench().await else { return };
    bench.queue.issue(&task(1, 1)).await.unwrap();
    let _: String = bench.ask(&["SCRIPT", "FLUSH"]).await;
    bench.queue.issue(&task(2, 1)).await.unwrap();
    assert_eq!(bench.queue.counts().await.unwrap().tasks, 2);
}

/// Replaces the only entry of a stream by a copy with one bit of its payload flipped.
async fn flip(bench: &RedisBench, stream: &str) {
    damage(bench, stream, |name, value| {
        if name == b"d" {
            let middle = value.len() / 2;
            value[middle] ^= 4;
        }
    })
    .await;
}

/// Replaces the only entry of a stream by a copy with damaged fields.
async fn damage(bench: &RedisBench, stream: &str, harm: impl Fn(&[u8], &mut Vec<u8>)) {
    let key = bench.key(stream);
    let entries: Vec<(String, Vec<Vec<u8>>)> = bench.ask(&["XRANGE", &key, "-", "+"]).await;
    let [(id, fields)] = &entries[..] else { panic!("{} entries", entries.len()) };
    let _: u64 = bench.ask(&["XDEL", &key, id]).await;
    let mut add = redis::cmd("XADD");
    add.arg(&key).arg("*");
    for pair in fields.chunks(2) {
        let mut value = pair[1].clone();
        harm(&pair[0], &mut value);
        add.arg(&pair[0]).arg(value);
    }
    let _: String = add.query_async(&mut bench.raw.clone()).await.expect("XADD");
}

#[tokio::test]
async fn a_damaged_id_is_read_from_the_payload() {
    let Some(bench) = bench().await else { return };
    let queue = &bench.queue;
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    // Another number, and none at all.
    for (k, rid) in [(0, &b"77"[..]), (1, &b"x"[..])] {
        let id = task(1, 4).id.rollout(k);
        let harm = |name: &[u8], value: &mut Vec<u8>| {
            if name == b"rid" {
                *value = rid.to_vec();
            }
        };
        queue.put_scored(&scored(rollout(&task(1, 4), k), 1.0)).await.unwrap();
        damage(&bench, "scored", harm).await;
        let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
        let DeliveryBody::Scored(sound) = &got[0].body else { panic!("{got:?}") };
        assert_eq!((sound.rollout.id, sound.reward.reward()), (id, Some(1.0)));
        queue.ack_scored(epoch, &[got[0].id.clone()]).await.unwrap();

        let id = task(1, 4).id.rollout(k + 2);
        queue.put_rollout(&rollout(&task(1, 4), k + 2)).await.unwrap();
        damage(&bench, "rollouts", harm).await;
        assert!(queue.lease_rollouts("reward-0", 1, NOW).await.unwrap().is_empty());
        let got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
        let DeliveryBody::Scored(unscored) = &got[0].body else { panic!("{got:?}") };
        assert_eq!((unscored.rollout.id, unscored.reward.reward()), (id, None));
        queue.ack_scored(epoch, &[got[0].id.clone()]).await.unwrap();
    }
    let counts = queue.counts().await.unwrap();
    assert_eq!((counts.delivered, counts.acked, counts.rollouts, counts.scored), (4, 4, 0, 0));
}

#[tokio::test]
async fn a_flipped_bit_becomes_a_bad_delivery_wherever_it_happens() {
    let Some(bench) = bench().await else { return };
    let (queue, a) = (&bench.queue, actor("a"));
    queue.issue(&task(1, 2)).await.unwrap();
    flip(&bench, "tasks").await;
    assert!(queue.lease_tasks(&a, 1, NOW).await.unwrap().is_empty());
    queue.put_rollout(&rollout(&task(2, 1), 0)).await.unwrap();
    flip(&bench, "rollouts").await;
    assert!(queue.lease_rollouts("reward-0", 1, NOW).await.unwrap().is_empty());
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let mut got = queue.fetch_scored(epoch, 9, NOW).await.unwrap();
    queue.ack_scored(epoch, &got.iter().map(|d| d.id.clone()).collect::<Vec<_>>()).await.unwrap();
    queue.put_scored(&scored(rollout(&task(3, 1), 0), 1.0)).await.unwrap();
    flip(&bench, "scored").await;
    got.extend(queue.fetch_scored(epoch, 9, NOW).await.unwrap());

    let bad: Vec<String> = got
        .iter()
        .map(|delivery| match &delivery.body {
            DeliveryBody::Bad { rollout, error } if error.to_string().contains("checksum") => {
                rollout.expect("an id").to_string()
            }
            body => panic!("{body:?}"),
        })
        .collect();
    assert_eq!(bad, ["1.0", "1.1", "2.0", "3.0"], "every rollout is accounted for");
    let counts = queue.counts().await.unwrap();
    assert_eq!((counts.delivered, counts.abandoned, counts.tasks, counts.rollouts), (4, 0, 0, 0));
    assert_eq!(queue.dead_letters(9).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_killed_server_comes_back_with_everything() {
    if !ManagedServer::available() {
        return println!("skipped: no server on the PATH");
    }
    let dir = tempfile::tempdir().unwrap();
    let mut server = ManagedServer::start(dir.path()).unwrap();
    let queue = RedisQueue::connect(&server.url(), &run(), &config()).await.unwrap();
    for k in 0..50 {
        queue.put_rollout(&rollout(&task(1, 64), k)).await.unwrap();
    }
    let before = queue.counts().await.unwrap();
    server.kill();
    let path = dir.path().to_owned();
    let again = tokio::task::spawn_blocking(move || {
        std::thread::sleep(Duration::from_millis(200));
        ManagedServer::start(&path).unwrap()
    });
    // The call spans the outage.
    assert_eq!(queue.put_rollout(&rollout(&task(1, 64), 50)).await.unwrap(), PutOutcome::Accepted);
    let after = queue.counts().await.unwrap();
    assert_eq!((before.delivered, after.delivered, after.rollouts), (50, 51, 51));
    drop(again.await.unwrap());
}

#[tokio::test]
async fn a_server_left_behind_is_taken_over() {
    if !ManagedServer::available() {
        return println!("skipped: no server on the PATH");
    }
    let dir = tempfile::tempdir().unwrap();
    let orphan = ManagedServer::start(dir.path()).unwrap();
    let pid = orphan.pid();
    let queue = RedisQueue::connect(&orphan.url(), &run(), &config()).await.unwrap();
    queue.issue(&task(1, 1)).await.unwrap();
    std::mem::forget(orphan);
    let server = ManagedServer::start(dir.path()).unwrap();
    assert_ne!(server.pid(), pid);
    assert_eq!(queue.counts().await.unwrap().issued, 1, "its data are taken over");
    let report = inspect(&server.url()).await.unwrap();
    assert_eq!((report.warnings.len(), report.appendonly), (0, Some(true)), "{report:?}");
}

#[tokio::test]
async fn an_unreachable_server_is_said_to_be_so() {
    let quick = QueueConfig { timeout_s: 0.4, ..config() };
    let begun = Instant::now();
    let nowhere = QueueSecret("redis://:canary@127.0.0.1:1/0".into());
    let error = RedisQueue::connect(&nowhere, &run(), &quick).await.err().expect("nobody is there");
    let text = error.to_string();
    assert!(matches!(error, QueueError::Unavailable { .. }), "{text}");
    assert!(text.contains("127.0.0.1:1/0") && !text.contains("canary"), "{text}");

    // Accepts and never answers: half-open.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = QueueSecret(format!("redis://{}", listener.local_addr().unwrap()));
    let error = RedisQueue::connect(&silent, &run(), &quick).await.err().expect("nobody answers");
    assert!(error.to_string().contains("no answer"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

    for (url, text) in [("nonsense", "is not understood"), ("managed", "must be started")] {
        let error =
            RedisQueue::connect(&QueueSecret(url.into()), &run(), &quick).await.err().expect("no server");
        assert!(matches!(&error, QueueError::Config(what) if what.contains(text)), "{error}");
    }
}

/// Stands between client and server; while `swallow` is set, the next reply is lost with its connection.
async fn proxy(server: PathBuf, socket: &Path, swallow: Arc<AtomicBool>) {
    let listener = UnixListener::bind(socket).unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (swallow, server) = (swallow.clone(), UnixStream::connect(&server).await.unwrap());
            tokio::spawn(async move {
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), server.into_split());
                let requests =
                    tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let mut bytes = vec![0; 1 << 16];
                while let Ok(n @ 1..) = from_server.read(&mut bytes).await {
                    if swallow.swap(false, Ordering::SeqCst)
                        || to_client.write_all(&bytes[..n]).await.is_err()
                    {
                        break;
                    }
                }
                requests.abort();
            });
        }
    });
}

#[tokio::test]
async fn a_lost_reply_loses_nothing() {
    let Some(bench) = bench().await else { return };
    let dir = tempfile::tempdir().unwrap();
    let (socket, swallow) = (dir.path().join("p.sock"), Arc::new(AtomicBool::new(false)));
    proxy(bench.url.0["unix://".len()..].into(), &socket, swallow.clone()).await;
    let url = QueueSecret(format!("unix://{}", socket.display()));
    let queue = RedisQueue::connect(&url, &bench.run, &bench.config).await.unwrap();
    for k in 0..4 {
        queue.put_scored(&scored(rollout(&task(1, 5), k), 1.0)).await.unwrap();
    }
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let held = queue.fetch_scored(epoch, 1, NOW).await.unwrap();
    assert_eq!(held.len(), 1);
    swallow.store(true, Ordering::SeqCst);
    let mut ids = Vec::new();
    loop {
        let got = queue.fetch_scored(epoch, 2, NOW).await.unwrap();
        if got.is_empty() {
            break;
        }
        ids.extend(got.into_iter().map(|delivery| match delivery.body {
            DeliveryBody::Scored(scored) => scored.rollout.id.index(),
            body => panic!("{body:?}"),
        }));
    }
    assert!(!swallow.load(Ordering::SeqCst), "a reply was lost");
    assert_eq!(ids, [1, 2, 3], "the lost ones again, the held one not");

    swallow.store(true, Ordering::SeqCst);
    let put = queue.put_scored(&scored(rollout(&task(1, 5), 4), 1.0)).await.unwrap();
    assert_eq!(put, PutOutcome::Duplicate, "done by the first try, seen by the second");
    assert_eq!(queue.counts().await.unwrap().delivered, 5);
}

#[tokio::test]
async fn an_outcome_is_given_until_it_is_confirmed() {
    let Some(bench) = bench().await else { return };
    let queue = &bench.queue;
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    for id in 1..=3 {
        queue.report(epoch, &outcome(&task(id, 1))).await.unwrap();
    }
    let ids = |got: Vec<GroupOutcome>| got.iter().map(|o| o.task.0).collect::<Vec<_>>();
    assert_eq!(ids(queue.outcomes(2, NOW).await.unwrap()), [1, 2]);
    let restarted = RedisQueue::connect(&bench.url, &bench.run, &bench.config).await.unwrap();
    assert_eq!(ids(restarted.outcomes(1, NOW).await.unwrap()), [1], "a pool that died confirmed nothing");
    assert_eq!(ids(restarted.outcomes(9, NOW).await.unwrap()), [2, 3]);
    assert!(restarted.outcomes(9, NOW).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_full_server_says_busy_and_drains() {
    let Some(bench) = own_bench().await else { return };
    let (queue, task) = (&bench.queue, task(1, 2));
    queue.put_scored(&scored(rollout(&task, 0), 1.0)).await.unwrap();
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    let _: String = bench.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
    assert_eq!(queue.put_rollout(&rollout(&task, 1)).await.unwrap(), PutOutcome::Busy);
    let issued = queue.issue(&task).await;
    assert!(matches!(issued, Err(QueueError::Unavailable { .. })), "{issued:?}");
    queue.renew_learner("learner", epoch).await.unwrap();
    let got = queue.fetch_scored(epoch, 1, NOW).await.unwrap();
    queue.ack_scored(epoch, &[got[0].id.clone()]).await.unwrap();
    let _: String = bench.ask(&["CONFIG", "SET", "maxmemory", "100mb"]).await;
    assert_eq!(queue.put_rollout(&rollout(&task, 1)).await.unwrap(), PutOutcome::Accepted);
}

#[tokio::test]
async fn damaged_weights_are_refused_and_old_ones_leave_nothing() {
    let Some(bench) = bench().await else { return };
    let (queue, run) = (&bench.queue, &bench.run);
    let store: Arc<RedisStore> =
        RedisStore::connect(&bench.url, run, &QueueConfig { keep_versions: 1, ..config() }).await.unwrap();
    let v = |step| PolicyVersion::new(1, step);
    let epoch = queue.acquire_learner("learner", 0).await.unwrap().unwrap();
    for step in 0..3 {
        store.publish(epoch, &weights(v(step), None, 9 << 20)).await.unwrap();
    }
    let pieces: Vec<String> = bench.ask(&["KEYS", &bench.key("wc:*")]).await;
    assert_eq!(pieces.len(), 3, "two pieces of the large chunk, one of the small: {pieces:?}");
    for piece in &pieces {
        assert_eq!(bench.ask::<i64>(&["TTL", piece]).await, -1, "published pieces do not expire");
    }
    let whole = store.fetch(Some(v(1))).await.unwrap();
    let manifest_key = bench.key("wm:1.2");
    let bad = async |what: &str| {
        let error = store.fetch(Some(v(1))).await.unwrap_err();
        assert!(
            matches!(error, QueueError::BadWeights { .. }) && error.to_string().contains(what),
            "{error}"
        );
    };
    for piece in &pieces {
        let bytes: Vec<u8> = bench.ask(&["GET", piece]).await;
        let other = if bytes[1] == b'~' { "!" } else { "~" };
        let _: u64 = bench.ask(&["SETRANGE", piece, "1", other]).await;
        bad("does not match its digest").await;
        let mut set = redis::cmd("SET");
        let _: String = set.arg(piece).arg(&bytes[1..]).query_async(&mut bench.raw.clone()).await.unwrap();
        bad("bytes, expected").await;
        let _: u64 = bench.ask(&["DEL", piece]).await;
        bad("is missing").await;
        let mut set = redis::cmd("SET");
        let _: String = set.arg(piece).arg(&bytes).query_async(&mut bench.raw.clone()).await.unwrap();
        assert_eq!(store.fetch(Some(v(1))).await.unwrap(), whole, "whole again");
    }
    let _: u64 = bench.ask(&["HSET", &manifest_key, "manifest", "rubbish"]).await;
    bad("checksum").await;
}
