use std::process::Command;

use super::*;
use crate::Network;

fn tool(netns: &Netns, line: &str) -> String {
    let args: Vec<&str> = line.split_whitespace().collect();
    let output =
        Command::new("nsenter").arg(format!("--net={}", netns.path_for_others())).args(args).output();
    let output = output.expect("nsenter (util-linux), ip and tc (iproute2)");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A namespace with a link, and a name in the file system by which an undo finds it.
fn pod() -> (Netns, Netns, Link) {
    let netns = Netns::create().unwrap();
    tool(&netns, "ip link add eth0 mtu 1400 type veth peer name peer0");
    // No word of its own, so that frames can be counted.
    tool(&netns, "ip link set eth0 addrgenmode none");
    tool(&netns, "ip link set eth0 up");
    tool(&netns, "ip link set peer0 up");
    let link = Network::scan(&netns).unwrap().links.into_iter().find(|l| l.name == "eth0").unwrap();
    // As a user's path leads to it.
    let named = Netns::open(&netns.path()).unwrap();
    (netns, named, link)
}

#[test]
fn frames_go_both_ways_and_an_undo_leaves_nothing() {
    let (_keeper, netns, link) = pod();
    let before = tool(&netns, "tc qdisc show dev eth0");
    let tap = netns.open_tap("lobhtap0").unwrap();
    let record = Undo::of(&netns, &link).unwrap().unwrap();
    join(&netns, &link, "lobhtap0").unwrap();
    assert!(tool(&netns, "ip link show lobhtap0").contains("mtu 1400"));
    assert!(tool(&netns, "tc filter show dev eth0 ingress").contains("Redirect to device lobhtap0"));
    assert!(tool(&netns, "tc filter show dev lobhtap0 ingress").contains("Redirect to device eth0"));
    assert!(matches!(netns.open_tap("lobhtap0"), Err(NetError::Busy(name)) if name == "lobhtap0"));

    // What is written to the tap leaves by the link, and is counted there.
    let counted = || -> u64 {
        let text = tool(&netns, "ip -s -j link show eth0");
        let at = text.rfind("\"tx\":{\"bytes\":").expect("counters") + 14;
        text[at..].chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    };
    let sent = counted();
    // After a virtio header of 10 bytes: a frame of the type for experiments (IEEE 802).
    let mut frame = vec![0; 10 + 64];
    frame[10..16].fill(0xff);
    frame[22] = 0x88;
    frame[23] = 0xb5;
    nix::unistd::write(&tap, &frame).unwrap();
    assert_eq!(counted(), sent + 64);

    undo(&record).unwrap();
    undo(&record).unwrap();
    // Children of other tests may hold copies of the descriptor until they are other programs.
    let mut watch = netns.within(Socket::watch_links).unwrap().unwrap();
    drop(tap);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while tool(&netns, "ip link").contains("lobhtap0") {
        watch.told(until).expect("a tap goes with its descriptor");
    }
    assert_eq!(tool(&netns, "tc qdisc show dev eth0"), before);
}

#[test]
fn a_discipline_that_was_there_stays() {
    let (_keeper, netns, _) = pod();
    tool(&netns, "tc qdisc add dev eth0 clsact");
    let link = Network::scan(&netns).unwrap().links.into_iter().find(|l| l.name == "eth0").unwrap();
    assert!(link.has_ingress);
    let _tap = netns.open_tap("lobhtap0").unwrap();
    join(&netns, &link, "lobhtap0").unwrap();
    undo(&Undo::of(&netns, &link).unwrap().unwrap()).unwrap();
    assert!(tool(&netns, "tc qdisc show dev eth0").contains("clsact"));
    assert_eq!(tool(&netns, "tc filter show dev eth0 ingress"), "");
}

#[test]
fn what_is_gone_needs_no_undoing() {
    let (_keeper, netns, link) = pod();
    let mut record = Undo::of(&netns, &link).unwrap().unwrap();
    record.link = 9999;
    undo(&record).unwrap();
    record.netns = "/no/such/netns".into();
    undo(&record).unwrap();
    record.netns = "/proc/self/ns/net".into();
    undo(&record).unwrap();
}
