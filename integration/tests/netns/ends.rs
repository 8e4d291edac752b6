//! How connections end: FIN as FIN, RST as RST, and no death as FIN.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use socket2::SockRef;
use vunet_integration::lab::{BLACKHOLE, BackendOptions, UNREACHABLE, WORLD};
use vunet_integration::world::{End, EndEvent, pattern, ports};

use crate::bench::{ANSWER_BYTES_MAX, Bench, Failure, MIB, PATIENCE, Setup, ensure, fail, scenario};

fn sink_end(bench: &Bench) -> Result<EndEvent, Failure> {
    Ok(bench.lab.wait_end(PATIENCE, "the end of a connection to the sink", |e| e.service == "sink")?)
}

/// A connection to the sink over which `count` bytes have certainly gone through vunet.
fn busy_sink(bench: &Bench) -> Result<TcpStream, Failure> {
    let mut stream = bench.connect_world(ports::SINK)?;
    pattern::send(1, MIB, &mut stream)?;
    Ok(stream)
}

#[test]
fn fin_is_fin() {
    scenario(&Setup::new(), |bench| {
        drop(busy_sink(bench)?);
        let end = sink_end(bench)?;
        ensure!(end.how == End::Fin && end.bytes == MIB, "{end}");
        Ok(())
    });
}

#[test]
fn rst_from_the_guest_is_rst() {
    scenario(&Setup::new(), |bench| {
        let stream = busy_sink(bench)?;
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        drop(stream);
        let end = sink_end(bench)?;
        ensure!(end.how == End::Rst, "{end}");
        Ok(())
    });
}

#[test]
fn rst_from_the_world_is_rst() {
    scenario(&Setup::new(), |bench| {
        let mut stream = bench.connect_world(ports::RESET)?;
        stream.write_all(b"x")?;
        match stream.read(&mut [0; 16]) {
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Ok(()),
            other => fail!("a reset arrived as {other:?}"),
        }
    });
}

#[test]
fn death_of_the_front_end_is_rst() {
    scenario(&Setup::new(), |bench| {
        let stream = busy_sink(bench)?;
        std::thread::sleep(Duration::from_millis(200));
        bench.guest.take().expect("the scenario attached a guest").process.kill();
        let end = sink_end(bench)?;
        ensure!(end.how == End::Rst, "a truncated upload looks complete: {end}");
        drop(stream);
        bench.attach(&[])?;
        bench.lease().map(drop)
    });
}

#[test]
fn death_of_vunet_is_rst() {
    scenario(&Setup::new(), |bench| {
        let stream = busy_sink(bench)?;
        std::thread::sleep(Duration::from_millis(200));
        bench.vunet.process.kill();
        let end = sink_end(bench)?;
        ensure!(end.how == End::Rst, "a truncated upload looks complete: {end}");
        drop(stream);
        bench.guest = None;
        bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
        Ok(())
    });
}

#[test]
fn an_orderly_end_of_vunet_is_rst_too() {
    scenario(&Setup::new(), |bench| {
        let stream = busy_sink(bench)?;
        std::thread::sleep(Duration::from_millis(200));
        let code = bench.vunet.process.stop();
        ensure!(code == Some(0), "vunet ended with {code:?}");
        let end = sink_end(bench)?;
        ensure!(end.how == End::Rst, "a truncated upload looks complete: {end}");
        drop(stream);
        bench.guest = None;
        bench.vunet = bench.lab.vunet(&BackendOptions::default())?;
        Ok(())
    });
}

#[test]
fn a_finished_upload_stays_finished_when_everything_dies() {
    scenario(&Setup::new(), |bench| {
        let mut stream = bench.connect_world(ports::DIGEST)?;
        pattern::send(3, MIB, &mut stream)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        (&stream).take(ANSWER_BYTES_MAX).read_to_string(&mut answer)?;
        drop(stream);
        let end = bench.lab.wait_end(PATIENCE, "the digest", |e| e.service == "digest")?;
        ensure!(end.how == End::Fin && end.bytes == MIB, "{end}");
        Ok(())
    });
}

#[test]
fn refusal_comes_back_at_once() {
    scenario(&Setup::new(), |bench| {
        for _ in 0..20 {
            let started = Instant::now();
            match bench.connect((WORLD, ports::CLOSED), PATIENCE) {
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => {}
                other => fail!("a closed port answered {other:?}"),
            }
            let took = started.elapsed();
            ensure!(took < Duration::from_millis(500), "the refusal took {took:?}");
        }
        Ok(())
    });
}

#[test]
fn unreachable_comes_back_as_icmp_at_once() {
    scenario(&Setup::new(), |bench| {
        let started = Instant::now();
        match bench.connect((UNREACHABLE, 80), PATIENCE) {
            Err(e) if matches!(e.kind(), ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable) => {}
            other => fail!("an unreachable network answered {other:?}"),
        }
        let took = started.elapsed();
        ensure!(took < Duration::from_secs(2), "the error took {took:?}");
        Ok(())
    });
}

#[test]
fn nothing_is_accepted_before_the_world_accepts() {
    scenario(&Setup::new(), |bench| match bench.connect((BLACKHOLE, 80), Duration::from_secs(2)) {
        Err(e) if e.kind() == ErrorKind::TimedOut => Ok(()),
        other => fail!("a black hole answered {other:?}"),
    });
}

#[test]
fn urgent_data_is_data() {
    scenario(&Setup::new(), |bench| {
        let stream = bench.connect_world(ports::SINK)?;
        let socket = SockRef::from(&stream);
        for _ in 0..50 {
            socket.send(b"plain")?;
            socket.send_out_of_band(b"!")?;
        }
        drop(stream);
        let end = sink_end(bench)?;
        ensure!(end.how == End::Fin && end.bytes == 300, "{end}");
        Ok(())
    });
}
