//! Links looked up and changed as this kernel does it, in a namespace of its own.

use std::io;
use std::process::Command;

use vunet::addr::MacAddr;
use vunet::uplink::links::{LinkKind, Links};

/// Set in the copy of this test that runs in a network namespace of its own.
const INSIDE: &str = "VUNET_TEST_INSIDE_NAMESPACE";

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().expect("ip runs");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What `ip` shows of a link holds every one of `parts`.
fn shown(name: &str, parts: &[&str]) {
    let text = ip(&format!("-d addr show dev {name}"));
    for part in parts {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

async fn inside() {
    let links = Links::open().expect("a netlink socket");
    let mac = MacAddr([0x02, 0xab, 0xcd, 0, 0, 9]);
    ip("link add one type veth peer name two");
    let plain = links.find("lo").await.unwrap().expect("a loopback");
    assert_eq!((plain.kind, plain.index, plain.master), (LinkKind::Plain, 1, None));
    let one = links.find("one").await.unwrap().expect("just made");
    assert_eq!((&one.kind, one.up, one.ip_mtu), (&LinkKind::Other("veth".into()), false, 1500));
    assert_eq!(links.find("none").await.unwrap(), None);
    assert_eq!(links.at(9999).await.unwrap(), None);

    let bridge = links.add_bridge("br", mac).await.unwrap();
    assert_eq!((&bridge.kind, bridge.mac, bridge.up), (&LinkKind::Bridge, Some(mac), false));
    let again = links.add_bridge("br", mac).await.unwrap_err();
    assert_eq!(again.source.kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(again.to_string(), "cannot make bridge br");
    links.set_alias(&bridge, "vunet:lab").await.unwrap();
    links.add_address(&bridge, "192.0.2.1".parse().unwrap(), 24).await.unwrap();
    links.set_up(&bridge).await.unwrap();
    shown("br", &["alias vunet:lab", "192.0.2.1/24", "02:ab:cd:00:00:09", "UP"]);

    links.set_ip_mtu(&one, 1400).await.unwrap();
    links.set_mac(&one, MacAddr([2, 0, 0, 0, 0, 5])).await.unwrap();
    links.set_master(&one, bridge.index).await.unwrap();
    links.set_up(&one).await.unwrap();
    shown("one", &["mtu 1400", "02:00:00:00:00:05", "master br"]);
    let seen = links.at(one.index).await.unwrap().expect("still there");
    assert_eq!((seen.name.as_str(), seen.master, seen.up), ("one", Some(bridge.index), true));
    let seen = links.at(bridge.index).await.unwrap().expect("still there");
    assert_eq!((seen.alias.as_deref(), seen.mac), (Some("vunet:lab"), Some(mac)), "the MAC is kept");
    let refused = links.set_master(&plain_again(&links).await, bridge.index).await.unwrap_err();
    assert_eq!(refused.to_string(), "cannot put on its bridge lo");

    let mut names: Vec<_> = links.all().await.unwrap().into_iter().map(|link| link.name).collect();
    names.sort();
    assert_eq!(names, ["br", "lo", "one", "two"]);
    links.delete(&bridge).await.unwrap();
    links.delete(&bridge).await.expect("what is gone already is no error");
    assert_eq!(links.find("br").await.unwrap(), None);
    assert_eq!(links.find("one").await.unwrap().unwrap().master, None);

    let two = links.find("two").await.unwrap().unwrap();
    let macvtap = links.add_macvtap("mt", two.index, mac).await.unwrap();
    assert_eq!((&macvtap.kind, macvtap.lower, macvtap.mac), (&LinkKind::MacVtap, Some(two.index), Some(mac)));
    shown("mt", &["macvtap", "mode bridge"]);
    links.set_silent(&macvtap).await.unwrap();
    let text = ip("-d link show dev mt");
    assert!(text.contains("addrgenmode none"), "{text}");
    ip("tuntap add dev tt mode tap");
    assert_eq!(links.find("tt").await.unwrap().unwrap().kind, LinkKind::Tun);
}

async fn plain_again(links: &Links) -> vunet::uplink::links::Link {
    links.find("lo").await.unwrap().expect("a loopback")
}

#[test]
fn links_are_found_made_and_changed_as_asked() {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        return runtime.block_on(inside());
    }
    let script =
        "ip link add probe type veth peer name probed && ip link del probe || exit 77; exec \"$0\" \"$@\"";
    let test = std::env::current_exe().expect("this test's own path");
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--net", "sh", "-c", script])
        .arg(test)
        .args(["--exact", "links::links_are_found_made_and_changed_as_asked", "--nocapture"])
        .env(INSIDE, "1")
        .status();
    match status.map(|status| status.code()) {
        Ok(Some(0)) => {}
        Ok(Some(77)) | Err(_) => eprintln!("skipped: no network namespace with a veth to be had here"),
        other => panic!("{other:?}"),
    }
}
