//! What a network is on the host, from the first that joins to the last that leaves.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vunet::addr::MacAddr;
use vunet::config::IpMtu;
use vunet::control::network_watch;
use vunet::network::allocator::{Client, IpAllocator as _};
use vunet::network::clock::SystemClock;
use vunet::network::definition::{Definition, Kind, NetworkId, OwnLan};
use vunet::network::guest_names::GuestNames as _;
use vunet::network::manager::{Joined, NetworkError, Networks};
use vunet::network::name::NetworkName;
use vunet::network::store::live_names::LiveNames;
use vunet::network::store::{LeaseStore, Pool};
use vunet::network::users::{PublishedPort, User};

use crate::host::{forwarding, host_state, nft, on_a_host, run, set_sysctl, state_dir, sysctl};

fn lan(third: u8, isolate: bool) -> OwnLan {
    OwnLan {
        subnet: format!("10.0.{third}.0/24").parse().unwrap(),
        gateway: Ipv4Addr::new(10, 0, third, 1),
        dns_domain: "lab.vunet.internal".to_owned(),
        ip_mtu: IpMtu::new(1400).unwrap(),
        isolate,
    }
}

fn nat() -> Kind {
    Kind::Nat { lan: lan(2, false), allow_host: false }
}

fn create(networks: &Networks, name: &str, kind: Kind) -> Definition {
    let name: NetworkName = name.parse().unwrap();
    let made = networks.create::<NetworkError>(&name, |_| {
        Ok(Definition { name: name.clone(), id: NetworkId::random().unwrap(), kind })
    });
    made.unwrap()
}

fn join(networks: &Networks, name: &str) -> Joined {
    networks.join(&name.parse().unwrap(), User::this_process().unwrap()).unwrap()
}

fn rules() -> String {
    run("nft", "list ruleset")
}

#[track_caller]
fn has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in:\n{text}");
    }
}

#[test]
fn the_first_in_makes_a_nat_network_and_the_last_out_removes_it() {
    on_a_host("life::the_first_in_makes_a_nat_network_and_the_last_out_removes_it", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        let before = host_state();
        let lab = create(&networks, "lab", nat());
        let bridge = lab.bridge();
        assert_eq!(host_state(), before, "a definition changes nothing on the host");
        let first = join(&networks, "lab");
        let second = join(&networks, "lab");
        let link = run("ip", &format!("-d addr show dev {bridge}"));
        has(&link, &["02:ab:cd:00:00:01", "10.0.2.1/24", "alias vunet:lab", "mtu 1400", "UP"]);
        assert!(!link.contains("inet6"), "the host has no IPv6 there: {link}");
        assert_eq!((&*forwarding("up0"), &*forwarding("up1")), ("1", "0"), "only the uplink is switched");
        assert_eq!(forwarding(&bridge), "1");
        assert_eq!(sysctl(&format!("ipv4/conf/{bridge}/arp_ignore")), "2");
        let shown = rules();
        has(&shown, &["masquerade", &format!("table inet vunet-{}", lab.id), "iifname \"up0\""]);
        drop(first);
        assert_eq!(rules(), shown, "the other one still needs it");
        assert_eq!(networks.users(&lab.name).unwrap().len(), 1);
        let refused = networks.remove(&lab.name).unwrap_err().to_string();
        has(&refused, &["lab is in use by process", &std::process::id().to_string()]);
        drop(second);
        assert_eq!(host_state(), before);
        networks.remove(&lab.name).unwrap();
        assert!(matches!(networks.find(&lab.name), Err(NetworkError::Unknown { .. })));
    });
}

#[test]
fn rules_that_others_flush_are_put_back_and_others_rules_stay() {
    on_a_host("life::rules_that_others_flush_are_put_back_and_others_rules_stay", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        nft(
            "add table inet mine; add chain inet mine c; add rule inet mine c counter comment \"vunet:mine\"",
        );
        let lab = create(&networks, "lab", nat());
        let (comment, bridge) = (lab.id.rule_comment(), lab.bridge());
        let before = host_state();
        let joined = join(&networks, "lab");
        assert!(!joined.restore().unwrap(), "nothing is amiss");
        let good = rules();
        for damage in [
            "flush ruleset".to_owned(),
            format!("delete table inet {}", lab.id.table()),
            format!("flush chain inet {} forward", lab.id.table()),
        ] {
            nft(&damage);
            assert!(joined.restore().unwrap(), "{damage}");
            has(&rules(), &["masquerade", "ct status dnat accept", &format!("iifname \"{bridge}\"")]);
            assert!(!joined.restore().unwrap(), "{damage}");
        }
        nft(
            "add table inet mine; add chain inet mine c; add rule inet mine c counter comment \"vunet:mine\"",
        );
        // Docker comes: a policy of drop, first without and then with a chain for users.
        nft(
            "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }",
        );
        assert!(joined.restore().unwrap());
        has(&run("nft", "list chain ip filter FORWARD"), &[&comment, "oifname \"up0\" accept"]);
        nft("add chain ip filter DOCKER-USER; insert rule ip filter FORWARD jump DOCKER-USER");
        assert!(joined.restore().unwrap());
        let docker = run("nft", "list chain ip filter DOCKER-USER");
        assert_eq!(docker.matches(&*comment).count(), 3, "{docker}");
        assert!(!run("nft", "list chain ip filter FORWARD").contains(&comment), "they moved");
        nft("flush chain ip filter DOCKER-USER");
        assert!(joined.restore().unwrap());
        assert_eq!(run("nft", "list chain ip filter DOCKER-USER"), docker);
        drop(joined);
        let left = rules();
        has(&left, &["vunet:mine", "policy drop", "jump DOCKER-USER"]);
        assert!(!left.contains(&comment) && !left.contains(&lab.id.table()), "{left}");
        nft("delete table ip filter");
        assert_eq!(host_state(), before);
        assert!(good.contains("vunet:mine"));
    });
}

#[test]
fn host_only_has_a_drop_of_its_own_whatever_forwarding_is() {
    on_a_host("life::host_only_has_a_drop_of_its_own_whatever_forwarding_is", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        let before = host_state();
        let lab = create(&networks, "lab", Kind::HostOnly { lan: lan(0, true) });
        let joined = join(&networks, "lab");
        let bridge = lab.bridge();
        assert_eq!((&*forwarding(&bridge), &*forwarding("up0")), ("0", "0"));
        let shown = run("nft", &format!("list table inet {}", lab.id.table()));
        has(
            &shown,
            &[
                &format!("iifname \"{bridge}\" oifname \"{bridge}\" drop"),
                &format!("\t\tiifname \"{bridge}\" drop"),
                &format!("\t\toifname \"{bridge}\" drop"),
            ],
        );
        assert!(!shown.contains("masquerade"), "{shown}");
        drop(joined);
        assert_eq!(host_state(), before);
    });
}

#[test]
fn forwarding_is_put_back_unless_the_host_became_a_router_and_follows_the_default_route() {
    on_a_host(
        "life::forwarding_is_put_back_unless_the_host_became_a_router_and_follows_the_default_route",
        || {
            let (_place, state) = state_dir();
            let networks = Networks::new(state.clone());
            create(&networks, "lab", nat());
            create(&networks, "web", Kind::Nat { lan: lan(3, false), allow_host: true });
            let both = || (forwarding("up0"), forwarding("up1"));
            let state_of = |up0: &str, up1: &str| (up0.to_owned(), up1.to_owned());
            let lab = join(&networks, "lab");
            let web = join(&networks, "web");
            assert_eq!(both(), state_of("1", "0"));
            run("ip", "route replace default via 198.51.100.2");
            lab.restore().unwrap();
            assert_eq!(both(), state_of("1", "1"), "the other network has not followed yet");
            web.restore().unwrap();
            assert_eq!(both(), state_of("0", "1"));
            has(&rules(), &["iifname \"up1\" oifname != \"vn-*\""]);
            drop(lab);
            assert_eq!(both(), state_of("0", "1"), "the other network needs it");
            drop(web);
            assert_eq!(both(), state_of("0", "0"));
            assert!(!state.path().join("forwarding.json").exists());
            // Somebody switches all on while a network is up: that stays, and is not guarded against.
            let lab = join(&networks, "lab");
            set_sysctl("ipv4/ip_forward", "1");
            lab.restore().unwrap();
            assert!(!rules().contains("oifname != \"vn-*\""), "{}", rules());
            drop(lab);
            assert_eq!(both(), state_of("1", "1"));
        },
    );
}

#[test]
fn what_has_the_bridges_name_and_is_not_ours_is_left_alone() {
    on_a_host("life::what_has_the_bridges_name_and_is_not_ours_is_left_alone", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        let lab = create(&networks, "lab", nat());
        let bridge = lab.bridge();
        let try_join = || networks.join(&lab.name, User::this_process().unwrap());
        for strange in ["type bridge", "type veth peer name strange", "alias mine type bridge"] {
            run("ip", &format!("link add {bridge} {}", strange.replace("alias mine ", "")));
            if strange.starts_with("alias") {
                run("ip", &format!("link set {bridge} alias vunet:other"));
            }
            let before = host_state();
            let error = try_join().unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            has(&cause, &[&bridge, "vunet did not make"]);
            assert_eq!(host_state(), before, "{strange}");
            networks.sweep(None);
            assert_eq!(host_state(), before, "{strange}");
            run("ip", &format!("link del {bridge}"));
        }
        // One of ours whose maker was killed before it could mark it.
        let before = host_state();
        run("ip", &format!("link add {bridge} address 02:ab:cd:00:00:01 type bridge"));
        drop(try_join().unwrap());
        assert_eq!(host_state(), before);
    });
}

#[test]
fn ports_of_a_user_lead_to_its_guest_once_it_has_an_address() {
    on_a_host("life::ports_of_a_user_lead_to_its_guest_once_it_has_an_address", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        let lab = create(&networks, "lab", nat());
        let mut one = join(&networks, "lab");
        let mut two = join(&networks, "lab");
        let port = |udp, host: &str, guest_port| PublishedPort {
            udp,
            host: host.parse().unwrap(),
            interface: None,
            guest_port,
        };
        let table = || run("nft", &format!("list table inet {}", lab.id.table()));
        let ports = vec![port(false, "0.0.0.0:8080", 80), port(false, "0.0.0.0:8443", 443)];
        one.update(|user| user.published = ports).unwrap();
        assert!(!table().contains("8080"), "there is no guest yet");
        one.update(|user| user.guest = Some(Ipv4Addr::new(10, 0, 2, 9))).unwrap();
        has(
            &table(),
            &["tcp dport { 8080, 8443 } dnat ip to 10.0.2.9:tcp dport map { 8080 : 80, 8443 : 443 }"],
        );
        two.update(|user| {
            user.guest = Some(Ipv4Addr::new(10, 0, 2, 10));
            user.published = vec![port(true, "192.0.2.1:53", 5353), port(false, "127.0.0.1:1", 1)];
        })
        .unwrap();
        let shown = table();
        has(&shown, &["10.0.2.9", "ip daddr 192.0.2.1 udp dport", "dnat ip to 10.0.2.10", "53 : 5353"]);
        assert!(!shown.contains("127.0.0.1"), "{shown}");
        drop(one);
        let shown = table();
        assert!(!shown.contains("10.0.2.9") && shown.contains("10.0.2.10"), "{shown}");
    });
}

#[test]
fn a_process_that_lives_puts_back_what_others_take_and_follows_the_default_route() {
    on_a_host("life::a_process_that_lives_puts_back_what_others_take_and_follows_the_default_route", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        let lab = create(&networks, "lab", nat());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let joined = Arc::new(Mutex::new(join(&networks, "lab")));
        runtime.spawn(network_watch::follow(Arc::clone(&joined)));
        let until = |what: &str, holds: &dyn Fn() -> bool| {
            let deadline = Instant::now() + Duration::from_secs(10);
            while !holds() {
                assert!(Instant::now() < deadline, "{what}: {}", rules());
                runtime.block_on(async { tokio::time::sleep(Duration::from_millis(20)).await });
            }
        };
        let table = lab.id.table();
        for _ in 0..3 {
            nft("flush ruleset");
            until("the table comes back", &|| rules().contains(&table));
        }
        nft(
            "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }",
        );
        until("accepts where a policy drops", &|| rules().contains(&lab.id.rule_comment()));
        run("ip", "route replace default via 198.51.100.2");
        until("the new uplink forwards", &|| forwarding("up1") == "1" && forwarding("up0") == "0");
        until("the new uplink is in the rules", &|| rules().contains("oifname \"up1\" accept"));
        set_sysctl("ipv4/ip_forward", "0");
        until("forwarding is switched on again", &|| forwarding("up1") == "1");
        run("ip", "tuntap add dev vt-9 mode tap");
        joined.lock().unwrap().update(|user| user.tap = Some("vt-9".to_owned())).unwrap();
        has(&run("ip", "link show dev vt-9"), &[&format!("master {}", lab.bridge())]);
        run("ip", &format!("link del {}", lab.bridge()));
        let tap = || run("ip", "link show dev vt-9");
        until("bridge and port come back", &|| tap().contains(&format!("master {}", lab.bridge())));
        has(&run("ip", &format!("addr show dev {}", lab.bridge())), &["10.0.2.1/24", "UP"]);
        run("ip", "link del vt-9");
        drop(runtime);
        drop(joined);
        assert!(!rules().contains(&table));
    });
}

#[test]
fn ports_of_an_isolated_network_are_kept_from_each_other() {
    on_a_host("life::ports_of_an_isolated_network_are_kept_from_each_other", || {
        let (_place, state) = state_dir();
        let networks = Networks::new(state);
        run("ip", "link add br0 type bridge");
        run("ip", "link set br0 up");
        let on_br0 = |isolate| Kind::Bridge { bridge: "br0".to_owned(), ip_mtu: IpMtu::DEFAULT, isolate };
        create(&networks, "apart", Kind::HostOnly { lan: lan(0, true) });
        create(&networks, "wire", on_br0(true));
        create(&networks, "open", on_br0(false));
        for (name, isolated) in [("apart", "isolated on"), ("wire", "isolated on"), ("open", "isolated off")]
        {
            run("ip", "tuntap add dev vt-9 mode tap");
            let mut joined = join(&networks, name);
            joined.update(|user| user.tap = Some("vt-9".to_owned())).unwrap();
            let bridge = joined.definition().bridge();
            has(&run("ip", "-d link show dev vt-9"), &[isolated, &format!("master {bridge}")]);
            drop(joined);
            run("ip", "link del vt-9");
        }
        has(&run("ip", "link show dev br0"), &["br0", "UP"]);
        run("ip", "link del br0");
        let gone = networks.join(&"wire".parse().unwrap(), User::this_process().unwrap()).unwrap_err();
        let cause = std::error::Error::source(&gone).unwrap().to_string();
        has(&cause, &["bridge br0 of network wire", "no such link", "--bridge"]);
    });
}

/// A process of `lab` that leases an address to card `n`, and the address.
fn lease_of_process(folder: &std::path::Path, holder: u64, n: u8) -> Ipv4Addr {
    let clock = Arc::new(SystemClock::new().unwrap());
    let pool = Pool::new("10.0.2.0/24".parse().unwrap(), Ipv4Addr::new(10, 0, 2, 1));
    let mut store = LeaseStore::open(folder, pool, clock, holder).unwrap().of_process().unwrap();
    let name = format!("vm{n}");
    let client = Client { mac: MacAddr([2, 0, 0, 0, 0, n]), id: None, host_name: Some(&name) };
    let now = vunet::time::Instant::ZERO;
    let offer = store.offer(now, &client, None).unwrap();
    store.bind(now, &client, offer.ip).unwrap().1.ip
}

#[test]
fn leases_of_a_process_that_is_gone_are_let_go_at_the_next_start_of_any_and_at_its_own_end() {
    on_a_host(
        "life::leases_of_a_process_that_is_gone_are_let_go_at_the_next_start_of_any_and_at_its_own_end",
        || {
            let (_place, state) = state_dir();
            let networks = Networks::new(state);
            let lab = create(&networks, "lab", nat());
            create(&networks, "web", Kind::HostOnly { lan: lan(3, false) });
            let folder = networks.folder(&lab.name);
            let user = |holder| User { holder: Some(holder), ..User::this_process().unwrap() };
            let first = networks.join(&lab.name, user(1)).unwrap();
            let second = networks.join(&lab.name, user(2)).unwrap();
            let [one, two] = [1, 2].map(|n| lease_of_process(&folder, n, n as u8));
            // Killed: there is no user file, or one that nobody has locked.
            let dead = lease_of_process(&folder, 3, 3);
            let clock = Arc::new(SystemClock::new().unwrap());
            let names = LiveNames::open(&folder, clock).unwrap();
            let of = |n: u8| names.address_of(&format!("vm{n}"));
            assert_eq!((of(1), of(2), of(3)), (Some(one), Some(two), Some(dead)));
            let web = join(&networks, "web");
            assert_eq!((of(1), of(2), of(3)), (Some(one), Some(two), None), "on another network");
            let dead = lease_of_process(&folder, 4, 4);
            assert_eq!(of(4), Some(dead));
            second.restore().unwrap();
            assert_eq!(of(4), None, "whoever keeps the network sees it at once");
            assert_eq!(lease_of_process(&folder, 5, 5), Ipv4Addr::new(10, 0, 2, 6));
            let third = networks.join(&lab.name, user(6)).unwrap();
            assert_eq!((of(1), of(2), of(5)), (Some(one), Some(two), None), "at a start");
            drop(first);
            assert_eq!((of(1), of(2)), (None, Some(two)), "at its own end");
            drop((third, second, web));
            assert_eq!(of(2), None, "the last one's too");
        },
    );
}
