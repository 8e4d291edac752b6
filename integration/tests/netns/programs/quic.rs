//! QUIC: its segmentation offloads, its search for the path's MTU, and a connection left idle.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, ServerConfig, TokioRuntime};
use vunet_integration::lab::WORLD;
use vunet_integration::world::pattern;

use super::IDLE;
use crate::bench::{Bench, Failure, MIB, Outcome, Setup, ensure, scenario};

const PORT: u16 = 4433;
const STREAMS: u64 = 4;
/// Time a whole test's exchanges may take.
const QUIC_PATIENCE: Duration = Duration::from_secs(40);

/// A certificate for `world.test`, and settings of both sides with it.
fn configs() -> Result<(ServerConfig, ClientConfig), Failure> {
    let made = rcgen::generate_simple_self_signed(vec!["world.test".to_owned()])?;
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    Ok((
        ServerConfig::with_single_cert(vec![certificate], key.into())?,
        ClientConfig::with_root_certificates(Arc::new(roots))?,
    ))
}

/// Sends back what comes on each stream, until the endpoint is closed.
async fn serve(endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        let Ok(connection) = incoming.await else { continue };
        tokio::spawn(async move {
            while let Ok((mut send, mut receive)) = connection.accept_bi().await {
                tokio::spawn(async move {
                    let mut chunk = vec![0; 16 << 10];
                    while let Ok(Some(len)) = receive.read(&mut chunk).await {
                        if send.write_all(&chunk[..len]).await.is_err() {
                            return;
                        }
                    }
                    // The client sees an end that did not come.
                    let _ = send.finish();
                });
            }
        });
    }
}

/// Sends `bytes` on a stream of `connection` and expects them back.
async fn exchange(connection: Connection, seed: u64, bytes: u64) -> Result<(), Failure> {
    let (mut send, mut receive) = connection.open_bi().await?;
    let mut sent = Vec::new();
    pattern::send(seed, bytes, &mut sent)?;
    let writer = tokio::spawn(async move {
        send.write_all(&sent).await?;
        Ok::<_, quinn::WriteError>(send.finish().is_ok())
    });
    let got = receive.read_to_end(64 << 20).await?;
    ensure!(writer.await??, "the stream was closed early");
    ensure!(got.len() as u64 == bytes, "{} of {bytes} bytes came back", got.len());
    pattern::expect(seed, bytes, &mut &got[..])?;
    Ok(())
}

/// Exchanges on several streams, idles, and exchanges again on the same connection.
async fn converse(server: UdpSocket, client: UdpSocket, bytes: u64) -> Outcome {
    let (server_config, client_config) = configs()?;
    let endpoint =
        |config, socket| Endpoint::new(EndpointConfig::default(), config, socket, Arc::new(TokioRuntime));
    let server = endpoint(Some(server_config), server)?;
    let serving = tokio::spawn(serve(server.clone()));
    let mut client = endpoint(None, client)?;
    client.set_default_client_config(client_config);
    let connection = client.connect((WORLD, PORT).into(), "world.test")?.await?;
    for pause in [Duration::ZERO, IDLE] {
        tokio::time::sleep(pause).await;
        let streams: Vec<_> =
            (0..STREAMS).map(|seed| tokio::spawn(exchange(connection.clone(), seed, bytes))).collect();
        for stream in streams {
            stream.await??;
        }
    }
    let path = connection.stats().path;
    println!("MTU {}, round trip {:?}, {} packets lost", path.current_mtu, path.rtt, path.lost_packets);
    // The search begins at 1,200 and finds what fits into the guest's 1,500.
    ensure!(path.current_mtu > 1400, "datagrams of {} bytes at most", path.current_mtu);
    connection.close(0u32.into(), b"done");
    client.wait_idle().await;
    server.close(0u32.into(), b"done");
    serving.await?;
    Ok(())
}

fn through(bench: &Bench, bytes: u64) -> Outcome {
    let bind = |to: SocketAddr| move || UdpSocket::bind(to);
    let server = bench.lab.world.inside(bind((WORLD, PORT).into()))?;
    let client = bench.lab.guest.inside(bind(([0, 0, 0, 0], 0).into()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { tokio::time::timeout(QUIC_PATIENCE, converse(server, client, bytes)).await })?
}

#[test]
fn quic_streams_carry_bytes_both_ways_before_and_after_a_pause() {
    scenario(&Setup::new(), |bench| through(bench, 4 * MIB));
}

#[test]
fn quic_over_a_bad_link_loses_nothing() {
    let faults = "delay=5ms,jitter=2ms,loss=1%,reorder=1%,duplicate=1%,corrupt=0.5%,rate=100mbit";
    scenario(&Setup::new().over_link(&["--to-a", faults, "--to-b", faults, "--seed", "3"]), |bench| {
        through(bench, MIB / 2)
    });
}
