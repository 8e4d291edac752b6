//! Every set of features, ring size and buffer size carries the same bytes.

use vunet_integration::guest::features::Features;
use vunet_integration::world::pattern::Pattern;

use crate::bench::{Bench, Failure, MIB, Outcome, Setup, bare, ensure, seed};

fn attach_and_transfer(bench: &mut Bench, args: &[&str], count_bytes: u64, seed: u64) -> Outcome {
    let run = |bench: &mut Bench| {
        bench.attach(args)?;
        bench.lease()?;
        bench.http_both_ways(count_bytes, seed)?;
        bench.detach().map(drop)
    };
    run(bench).map_err(|Failure(text)| Failure(format!("with {args:?}: {text}")))
}

#[test]
fn every_feature_at_once() {
    bare(&Setup::new().tools(&["curl"]).vunet(&["--mac", "52:54:00:aa:bb:cc"]), |bench| {
        bench.attach(&["--features", "all"])?;
        let mac = &bench.front_end().ready["mac"];
        ensure!(mac == "52:54:00:aa:bb:cc", "the guest's MAC address is {mac}");
        let offered = bench.front_end().ready["features"].clone();
        for name in [
            "csum",
            "guest_csum",
            "guest_tso4",
            "host_tso4",
            "mrg_rxbuf",
            "indirect_desc",
            "event_idx",
            "version_1",
            "in_order",
            "mac",
            "mtu",
            "protocol_features",
        ] {
            let has = offered.as_array().is_some_and(|names| names.iter().any(|n| n == name));
            ensure!(has, "{name} was not negotiated: {offered}");
        }
        bench.lease()?;
        bench.http_both_ways(32 * MIB, 1)?;
        let counters = bench.detach()?;
        ensure!(counters.gso_from_guest > 0, "no segmentation offload from the guest: {counters:?}");
        ensure!(counters.gso_to_guest > 0, "no segmentation offload to the guest: {counters:?}");
        ensure!(counters.merged_to_guest > 0, "no frame spans receive buffers: {counters:?}");
        Ok(())
    });
}

#[test]
fn no_feature_at_all() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        // Several queue pairs are a feature.
        for (n, features) in
            [&["none"][..], &["none", "--protocol", "none"], &["version_1"]].iter().enumerate()
        {
            let args = [&["--queues", "1", "--features"][..], features].concat();
            attach_and_transfer(bench, &args, 8 * MIB, n as u64)?;
        }
        Ok(())
    });
}

#[test]
fn twenty_random_subsets_of_features() {
    let seed = seed();
    bare(&Setup::new().tools(&["curl"]), |bench| {
        let mut random = Pattern::new(seed);
        for round in 0..20 {
            let drawn = Features(Features::all().0 & random.next_u64());
            let protocol = if random.next_u64() & 1 == 0 { "all" } else { "reply_ack,mq" };
            let order = if random.next_u64() & 1 == 0 { "spec" } else { "qemu" };
            let features = drawn.with_dependencies_met().to_string();
            let args = ["--features", &features, "--protocol", protocol, "--order", order];
            attach_and_transfer(bench, &args, 8 * MIB, round)?;
        }
        Ok(())
    });
}

#[test]
fn receive_buffers_of_any_size() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        for size in ["128", "1536", "4096", "65536", "65562"] {
            attach_and_transfer(bench, &["--rx-buffer", size], 8 * MIB, 1)?;
            let without = ["--rx-buffer", size, "--features", "all,-mrg_rxbuf"];
            attach_and_transfer(bench, &without, 8 * MIB, 2)?;
        }
        Ok(())
    });
}

#[test]
fn rings_of_any_size() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        for size in ["64", "128", "256", "512", "1024"] {
            attach_and_transfer(bench, &["--ring-size", size], 8 * MIB, 1)?;
            let direct = ["--ring-size", size, "--features", "all,-indirect_desc", "--rx-buffer", "1536"];
            attach_and_transfer(bench, &direct, 8 * MIB, 2)?;
        }
        Ok(())
    });
}

#[test]
fn descriptors_cut_anywhere() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        for cuts in ["12,65562", "1,13,20,1024", "26,14,1500", "66,4096", "65562"] {
            attach_and_transfer(bench, &["--tx-cuts", cuts], 8 * MIB, 1)?;
            let direct = ["--tx-cuts", cuts, "--features", "all,-indirect_desc,-event_idx"];
            attach_and_transfer(bench, &direct, 8 * MIB, 2)?;
        }
        Ok(())
    });
}

#[test]
fn qemus_order_of_messages() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        for protocol in ["all", "none", "all,-config,-configure_mem_slots"] {
            let args = ["--order", "qemu", "--protocol", protocol, "--queues", "1"];
            attach_and_transfer(bench, &args, 8 * MIB, 1)?;
        }
        Ok(())
    });
}

#[test]
fn several_queue_pairs() {
    bare(&Setup::new().tools(&["curl"]), |bench| {
        for queues in ["1", "2", "4"] {
            attach_and_transfer(bench, &["--queues", queues], 16 * MIB, 1)?;
            attach_and_transfer(bench, &["--queues", queues, "--order", "qemu"], 8 * MIB, 2)?;
        }
        Ok(())
    });
}

#[test]
fn several_workers_share_the_queue_pairs() {
    for flags in [&["--queues", "2"][..], &["--queues", "4", "--busy-poll-us", "50", "--pin", "0"]] {
        bare(&Setup::new().tools(&["curl"]).vunet(flags), |bench| {
            for queues in ["1", "2", "4"] {
                attach_and_transfer(bench, &["--queues", queues], 16 * MIB, 1)?;
            }
            Ok(())
        });
    }
}

#[test]
fn large_and_small_mtus() {
    for mtu in ["576", "1280", "9000", "65520"] {
        bare(&Setup::new().tools(&["curl"]).vunet(&["--ip-mtu", mtu]), |bench| {
            attach_and_transfer(bench, &[], 8 * MIB, 1)?;
            attach_and_transfer(bench, &["--features", "version_1,mtu"], 4 * MIB, 2)
        });
    }
}
