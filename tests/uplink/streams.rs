//! TCP streams, and those to the process's own DNS service.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use proptest::prelude::*;
use socket2::SockRef;
use vunet::config::{Protocol, Publish};
use vunet::engine::host_net::{Close, HostListener, HostNet, HostStream, Token};
use vunet::frame::PayloadMut;
use vunet::uplink::published::bind;
use vunet::uplink::sockets::Stream;

use crate::{Uplink, both_ways, loopback, pattern, peek, peek_when_there, read_to_end, send};

const TOKEN: Token = Token(7);

fn would_block<T>(outcome: &std::io::Result<T>) -> bool {
    outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn bytes_are_peeked_in_order_again_and_again_until_discarded() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        assert!(would_block(&peek(&mut stream, 0, 10)), "nothing was sent");
        far.write_all(b"0123456789").expect("sent");
        uplink.await_event(TOKEN, |ready| ready.readable);
        assert_eq!(peek(&mut stream, 0, 4).expect("bytes"), b"0123");
        assert_eq!(peek(&mut stream, 4, 4).expect("bytes"), b"4567");
        assert_eq!(peek(&mut stream, 8, 4).expect("bytes"), b"89");
        assert!(would_block(&peek(&mut stream, 10, 4)));
        assert_eq!(peek(&mut stream, 0, 4).expect("bytes"), b"0123", "back to the front");
        stream.discard(3).expect("discarded");
        assert_eq!(peek(&mut stream, 1, 3).expect("bytes"), b"456", "on from where it was");
        assert_eq!(peek(&mut stream, 0, 100).expect("bytes"), b"3456789");
        stream.discard(7).expect("discarded");
        assert!(would_block(&peek(&mut stream, 0, 4)));
        far.write_all(b"ab").expect("sent");
        assert_eq!(peek_when_there(&mut stream, 0, 4).expect("bytes"), b"ab");
    });
}

#[test]
fn a_streams_receive_window_grows_though_bytes_stay_in_its_queue() {
    let mut uplink = Uplink::new(true);
    let (mut stream, mut far) = uplink.connected(TOKEN);
    let room = |stream: &Stream| SockRef::from(stream).recv_buffer_size().expect("a size");
    let first = room(&stream);
    far.set_nonblocking(true).expect("an option");
    let bytes = pattern(8 << 10);
    // All that the window takes; what the kernel judges by is then in the queue, and stays there.
    while far.write(&bytes).is_ok() {}
    uplink.await_event(TOKEN, |ready| ready.readable);
    for _ in 0..6 {
        peek_when_there(&mut stream, 0, 8 << 10).expect("bytes");
        stream.discard(8 << 10).expect("discarded");
    }
    // A quarter of 64 KiB was taken, and one of 128 KiB.
    assert!(room(&stream) >= 256 << 10, "{first} to {}", room(&stream));
    // Any byte wakes as before.
    let mut left = 0;
    while let Ok(part) = peek(&mut stream, left, 64 << 10) {
        left += part.len();
    }
    stream.discard(left).expect("discarded");
    while far.write(b"x").is_err() {}
    uplink.await_event(TOKEN, |ready| ready.readable);
}

#[test]
fn any_sequence_of_peeks_and_discards_sees_the_stream() {
    // What a fresh socket's window holds at once: loopback opens it again only when it is empty.
    const BYTES: usize = 40_000;
    let bytes = pattern(BYTES);
    let steps = proptest::collection::vec((0..BYTES, 1..BYTES, 0..BYTES / 4), 1..20);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) };
    let sees_the_stream = |steps: Vec<(usize, usize, usize)>| {
        both_ways(|mut uplink| {
            let (mut stream, mut far) = uplink.connected(TOKEN);
            far.write_all(&bytes).expect("sent");
            let mut peeked = 0;
            while peeked < BYTES {
                let part = peek_when_there(&mut stream, peeked, BYTES - peeked).expect("bytes");
                assert!(part == bytes[peeked..][..part.len()]);
                peeked += part.len();
            }
            let mut rest = &bytes[..];
            for (offset, len, discard) in &steps {
                let offset = (*offset).min(rest.len());
                match peek(&mut stream, offset, *len) {
                    Ok(part) => assert!(part == rest[offset..][..(*len).min(rest.len() - offset)]),
                    Err(error) => {
                        assert_eq!((error.kind(), offset), (ErrorKind::WouldBlock, rest.len()));
                    }
                }
                let discard = (*discard).min(rest.len());
                stream.discard(discard).expect("discarded");
                rest = &rest[discard..];
            }
        });
        Ok(())
    };
    proptest::test_runner::TestRunner::new(config).run(&steps, sees_the_stream).expect("every sequence");
}

#[test]
fn a_window_of_many_undiscarded_bytes_is_peeked_behind() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        let bytes = pattern(64 << 20);
        let sent = bytes.clone();
        let writer = std::thread::spawn(move || far.write_all(&sent).map(|()| far));
        // The kernel opens a window only for who discards.
        let mut front = 0;
        while front < 32 << 20 {
            let part = peek_when_there(&mut stream, 0, 1 << 20).expect("bytes");
            assert!(part == bytes[front..][..part.len()]);
            stream.discard(part.len()).expect("discarded");
            front += part.len();
        }
        let mut peeked = 0;
        while peeked < 200_000 {
            let part = peek_when_there(&mut stream, peeked, 50_000).expect("bytes");
            assert!(part == bytes[front + peeked..][..part.len()]);
            peeked += part.len();
        }
        assert!(peek(&mut stream, 150_001, 1000).expect("bytes") == bytes[front + 150_001..][..1000]);
        drop(stream);
        let _ = writer.join().expect("the writer ends");
    });
}

#[test]
fn the_end_of_the_stream_follows_the_last_byte_whether_or_not_it_was_discarded() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        far.write_all(b"last words").expect("sent");
        assert_eq!(peek_when_there(&mut stream, 0, 100).expect("bytes"), b"last words");
        assert!(would_block(&peek(&mut stream, 10, 100)), "no end yet");
        far.shutdown(Shutdown::Write).expect("FIN");
        uplink.await_event(TOKEN, |ready| ready.peer_closed);
        assert_eq!(peek(&mut stream, 10, 100).expect("the end"), b"");
        assert_eq!(peek(&mut stream, 5, 100).expect("bytes"), b"words");
        stream.discard(10).expect("discarded");
        assert_eq!(peek(&mut stream, 0, 100).expect("the end"), b"");
    });
}

#[test]
fn an_end_that_came_with_the_bytes_is_seen() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        far.write_all(b"all").expect("sent");
        far.shutdown(Shutdown::Write).expect("FIN");
        uplink.await_event(TOKEN, |ready| ready.peer_closed);
        assert_eq!(peek(&mut stream, 0, 100).expect("bytes"), b"all");
        assert_eq!(peek(&mut stream, 3, 100).expect("the end"), b"");
    });
}

/// Ends a connection with RST.
fn reset(far: TcpStream) {
    SockRef::from(&far).set_linger(Some(Duration::ZERO)).expect("lingers");
    drop(far);
}

#[test]
fn a_reset_is_an_error_and_never_the_end_of_the_stream() {
    for peeked in [false, true] {
        both_ways(|mut uplink| {
            let (mut stream, mut far) = uplink.connected(TOKEN);
            far.write_all(b"half a file").expect("sent");
            uplink.await_event(TOKEN, |ready| ready.readable);
            if peeked {
                assert_eq!(peek(&mut stream, 0, 100).expect("bytes"), b"half a file");
            }
            reset(far);
            uplink.await_event(TOKEN, |ready| ready.failed);
            let mut at = if peeked { 11 } else { 0 };
            let error = loop {
                match peek(&mut stream, at, 100) {
                    Ok(bytes) => {
                        assert!(!bytes.is_empty(), "a reset looks like a clean end");
                        at += bytes.len();
                    }
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        });
    }
}

#[test]
fn sending_into_a_reset_connection_is_an_error() {
    both_ways(|mut uplink| {
        let (mut stream, far) = uplink.connected(TOKEN);
        reset(far);
        uplink.await_event(TOKEN, |ready| ready.failed);
        let error = send(&mut stream, b"x").expect_err("it is gone");
        assert_ne!(error.kind(), ErrorKind::WouldBlock);
    });
}

#[test]
fn a_refused_connect_fails_with_its_error() {
    both_ways(|mut uplink| {
        let free = TcpListener::bind(loopback(0)).expect("a port").local_addr().expect("an address");
        match uplink.net.connect(TOKEN, free) {
            Ok(mut stream) => {
                uplink.await_event(TOKEN, |ready| ready.failed);
                let error = stream.take_error().expect_err("refused");
                assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionRefused),
        }
    });
}

#[test]
fn a_dropped_stream_is_a_reset_to_its_far_end_whatever_was_sent() {
    for shut in [false, true] {
        both_ways(|mut uplink| {
            let (mut stream, mut far) = uplink.connected(TOKEN);
            send(&mut stream, b"half an upload").expect("sent");
            if shut {
                stream.shutdown_write().expect("FIN");
            }
            drop(stream);
            // After a FIN the far end has its end of the stream; what it then sends is refused.
            let (_, outcome) = read_to_end(&mut far);
            if shut {
                let written = far.write_all(b"x").and_then(|()| {
                    std::thread::sleep(Duration::from_millis(20));
                    far.write_all(b"x")
                });
                assert!(written.is_err() || outcome.is_err(), "it lives on");
            } else {
                assert_eq!(outcome.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
            }
        });
    }
}

#[test]
fn a_stream_closed_as_reset_is_a_reset_to_its_far_end() {
    both_ways(|mut uplink| {
        let (stream, mut far) = uplink.connected(TOKEN);
        stream.close(Close::Reset);
        assert_eq!(read_to_end(&mut far).1.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
    });
}

#[test]
fn a_stream_closed_cleanly_delivers_what_is_queued_and_ends() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        let bytes = pattern(10 << 20);
        let mut sent = 0;
        while let Ok(len) = send(&mut stream, &bytes[sent..]) {
            sent += len;
        }
        assert!(sent > 10_000);
        stream.shutdown_write().expect("FIN");
        far.shutdown(Shutdown::Write).expect("FIN");
        uplink.await_event(TOKEN, |ready| ready.peer_closed);
        stream.close(Close::Clean);
        let (received, outcome) = read_to_end(&mut far);
        outcome.expect("a clean end");
        assert!(received == bytes[..sent]);
    });
}

#[test]
fn a_full_socket_is_tight_and_tells_of_room_once_there_is() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        let space = stream.send_space();
        assert!(space.bytes > 4096 && !space.tight, "{space:?}");
        let chunk = pattern(50_000);
        let mut sent = 0;
        loop {
            match send(&mut stream, &chunk) {
                Ok(len) => sent += len,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        let space = stream.send_space();
        assert!(space.tight && space.bytes < 100_000, "{space:?}");
        while !uplink.events(Duration::from_millis(20)).is_empty() {}
        stream.want_writable();
        uplink.assert_quiet();
        let mut received = vec![0; sent];
        far.read_exact(&mut received).expect("all of it");
        uplink.await_event(TOKEN, |ready| ready.writable);
        assert!(!stream.send_space().tight);
        assert!(send(&mut stream, &chunk).is_ok());
    });
}

#[test]
fn a_socket_that_is_not_tight_is_writable_at_once() {
    both_ways(|mut uplink| {
        let (mut stream, _far) = uplink.connected(TOKEN);
        while !uplink.events(Duration::from_millis(20)).is_empty() {}
        stream.want_writable();
        uplink.await_event(TOKEN, |ready| ready.writable);
    });
}

#[test]
fn the_space_said_to_be_there_is_there() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        for size in [1usize, 1460, 65_000] {
            let chunk = pattern(size);
            for _ in 0..200 {
                let space = stream.send_space().bytes;
                if space < size {
                    break;
                }
                assert_eq!(send(&mut stream, &chunk).expect("room was promised"), size);
            }
        }
        far.set_nonblocking(true).expect("nonblocking");
        let mut sink = vec![0; 1 << 20];
        while far.read(&mut sink).is_ok_and(|len| len > 0) {}
    });
}

#[test]
fn peeked_bytes_make_no_further_events_but_new_ones_do() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        far.write_all(b"one").expect("sent");
        uplink.await_event(TOKEN, |ready| ready.readable);
        assert_eq!(peek_when_there(&mut stream, 0, 100).expect("bytes"), b"one");
        uplink.assert_quiet();
        far.write_all(b"two").expect("sent");
        uplink.await_event(TOKEN, |ready| ready.readable);
        assert_eq!(peek(&mut stream, 3, 100).expect("bytes"), b"two");
        uplink.assert_quiet();
    });
}

#[test]
fn urgent_bytes_are_announced_and_lie_in_the_stream_where_they_were_sent() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        far.write_all(b"before").expect("sent");
        SockRef::from(&far).send_out_of_band(b"!").expect("sent");
        far.write_all(b"after").expect("sent");
        let ready = uplink.await_event(TOKEN, |ready| ready.readable);
        let urgent = ready.urgent || uplink.await_event(TOKEN, |ready| ready.urgent).urgent;
        assert!(urgent, "a short read is no sign of an empty queue then");
        // Reads stop at the mark and go on behind it, as far as what lies before it was discarded.
        let mut received = Vec::new();
        let mut peeked = 0;
        while received.len() + peeked < 12 {
            match peek(&mut stream, peeked, 100) {
                Ok(bytes) => {
                    assert_eq!(bytes[..], b"before!after"[received.len() + peeked..][..bytes.len()]);
                    peeked += bytes.len();
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    assert!(peeked > 0, "it is stuck after {received:?}");
                    stream.discard(peeked).expect("discarded");
                    received.extend_from_slice(&b"before!after"[received.len()..][..peeked]);
                    peeked = 0;
                }
            }
        }
    });
}

#[test]
fn small_writes_wait_for_no_acknowledgement_and_a_dead_world_is_asked_for() {
    both_ways(|mut uplink| {
        let (stream, far) = uplink.connected(TOKEN);
        let bound = bind(&mut Publish::new(Protocol::Tcp, loopback(0), 80)).expect("bound");
        let address = bound.local_addr().expect("an address").as_socket().expect("an address");
        let mut listener = uplink.net.listener(Token(1), bound).expect("a listener");
        let client = TcpStream::connect(address).expect("a client");
        uplink.await_event(Token(1), |ready| ready.readable);
        let (published, _) = listener.accept(Token(2)).expect("a client");
        for stream in [stream, published] {
            let socket = SockRef::from(&stream);
            // The guest's own Nagle has held back what it wanted to; a second one costs a round trip.
            assert!(socket.tcp_nodelay().expect("an option"));
            assert!(socket.keepalive().expect("an option"));
        }
        drop((far, client));
    });
}

#[test]
fn a_published_port_is_had_again_at_once_though_its_connections_linger() {
    let mut address = loopback(0);
    for _ in 0..3 {
        let uplink = Uplink::new(true);
        let bound = bind(&mut Publish::new(Protocol::Tcp, address, 80)).expect("bound again");
        address = bound.local_addr().expect("an address").as_socket().expect("an address");
        let mut listener = uplink.net.listener(Token(1), bound).expect("a listener");
        let mut client = TcpStream::connect(address).expect("a client");
        uplink.await_event(Token(1), |ready| ready.readable);
        let (mut stream, _) = listener.accept(Token(2)).expect("a client");
        // Who ends first keeps the connection in TIME-WAIT.
        stream.shutdown_write().expect("FIN");
        assert_eq!(client.read(&mut [0; 1]).expect("an end"), 0);
        client.shutdown(Shutdown::Write).expect("FIN");
        uplink.await_event(Token(2), |ready| ready.peer_closed);
        stream.close(Close::Clean);
    }
}

#[test]
fn streams_of_a_published_port_end_like_any_other() {
    both_ways(|uplink| {
        let bound = bind(&mut Publish::new(Protocol::Tcp, loopback(0), 80)).expect("bound");
        let address = bound.local_addr().expect("an address").as_socket().expect("an IP address");
        let mut listener = uplink.net.listener(Token(1), bound).expect("a listener");
        assert!(listener.accept(Token(2)).is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
        let mut clients: Vec<TcpStream> =
            (0..5).map(|_| TcpStream::connect(address).expect("connected")).collect();
        uplink.await_event(Token(1), |ready| ready.readable);
        let mut streams = Vec::new();
        while let Ok((stream, client)) = listener.accept(Token(10 + streams.len() as u64)) {
            assert_eq!(client, clients[streams.len()].local_addr().expect("an address"));
            streams.push(stream);
        }
        assert_eq!(streams.len(), 5);
        clients[3].write_all(b"hello").expect("sent");
        uplink.await_event(Token(13), |ready| ready.readable);
        assert_eq!(peek(&mut streams[3], 0, 100).expect("bytes"), b"hello");
        drop(streams);
        assert_eq!(read_to_end(&mut clients[0]).1.expect_err("a reset").kind(), ErrorKind::ConnectionReset);
        TcpStream::connect(address).expect("connected");
        uplink.await_event(Token(1), |ready| ready.readable);
    });
}

#[test]
fn a_stream_to_the_dns_service_is_peeked_discarded_and_ended_like_tcp() {
    both_ways(|mut uplink| {
        let mut stream = uplink.net.connect_dns(TOKEN).expect("a stream");
        let mut far = uplink.dns.borrow_mut().pop().expect("the far end");
        uplink.await_event(TOKEN, |ready| ready.writable);
        stream.take_error().expect("connected");
        assert_eq!(send(&mut stream, b"question").expect("sent"), 8);
        let mut question = [0; 8];
        far.read_exact(&mut question).expect("it came");
        for part in [&b"an"[..], b"sw", b"er", &pattern(100_000)] {
            far.write_all(part).expect("sent");
        }
        uplink.await_event(TOKEN, |ready| ready.readable);
        assert_eq!(peek(&mut stream, 0, 4).expect("bytes"), b"answ");
        assert_eq!(peek(&mut stream, 4, 2).expect("bytes"), b"er");
        assert_eq!(peek(&mut stream, 1, 3).expect("bytes"), b"nsw");
        stream.discard(6).expect("discarded");
        let mut at = 0;
        while at < 100_000 {
            let bytes = peek(&mut stream, at, 60_000).expect("bytes");
            assert!(bytes == pattern(100_000)[at..][..bytes.len()]);
            at += bytes.len();
        }
        assert!(would_block(&peek(&mut stream, at, 100)));
        far.shutdown(Shutdown::Write).expect("end");
        uplink.await_event(TOKEN, |ready| ready.peer_closed);
        assert_eq!(peek(&mut stream, at, 100).expect("the end"), b"");
        stream.discard(at).expect("discarded");
        assert_eq!(peek(&mut stream, 0, 100).expect("the end"), b"");
        let space = stream.send_space();
        assert!(space.bytes > 4096 && !space.tight, "{space:?}");
        stream.shutdown_write().expect("end");
        stream.close(Close::Clean);
        assert_eq!(far.read(&mut question).expect("the end"), 0);
    });
}

#[test]
fn a_full_stream_to_the_dns_service_tells_of_room() {
    let mut uplink = Uplink::new(true);
    let mut stream = uplink.net.connect_dns(TOKEN).expect("a stream");
    let mut far = uplink.dns.borrow_mut().pop().expect("the far end");
    let chunk = pattern(10_000);
    let mut sent = 0;
    while let Ok(len) = send(&mut stream, &chunk) {
        sent += len;
    }
    assert!(stream.send_space().tight);
    while !uplink.events(Duration::from_millis(20)).is_empty() {}
    stream.want_writable();
    uplink.assert_quiet();
    let mut received = vec![0; sent];
    far.read_exact(&mut received).expect("all of it");
    uplink.await_event(TOKEN, |ready| ready.writable);
    assert!(send(&mut stream, &chunk).is_ok());
}

#[test]
fn a_peek_into_many_segments_is_not_cut_short() {
    both_ways(|mut uplink| {
        let (mut stream, mut far) = uplink.connected(TOKEN);
        let bytes = pattern(40_000);
        far.write_all(&bytes).expect("sent");
        let mut offset = 0;
        while offset < bytes.len() {
            offset += peek_when_there(&mut stream, offset, 40_000).expect("bytes").len();
        }
        let mut memory = vec![0u8; 1024 * 16];
        let base = memory.as_mut_ptr();
        let segments: Vec<libc::iovec> = (0..1024)
            .map(|n| libc::iovec { iov_base: base.wrapping_add(n * 16).cast(), iov_len: 16 })
            .collect();
        for (offset, expected) in [(0, 16_384), (10_001, 16_384), (30_000, 10_000)] {
            // SAFETY: the segments lie in `memory`, which outlives the view and is not touched meanwhile.
            let into = unsafe { PayloadMut::from_guest(&segments) };
            let len = stream.peek(offset, into).expect("bytes");
            assert_eq!(len, expected, "a short read would mean an empty queue");
            assert!(memory[..len] == bytes[offset..][..len]);
        }
    });
}
