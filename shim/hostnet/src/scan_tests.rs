use std::process::Command;

use super::*;

/// Runs `ip` there.
fn ip(netns: &Netns, line: &str) {
    let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let output = Command::new("nsenter")
        .arg(format!("--net={}", netns.path_for_others()))
        .arg("ip")
        .args(args)
        .output();
    let output = output.expect("nsenter (util-linux) and ip (iproute2)");
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn an_empty_namespace_has_nothing_to_tell() {
    let netns = Netns::create().unwrap();
    ip(&netns, "link set lo up");
    assert_eq!(Network::scan(&netns).unwrap(), Network::default());
}

#[test]
fn a_veth_is_told_with_all_that_is_set_for_it() {
    let (netns, other) = (Netns::create().unwrap(), Netns::create().unwrap());
    ip(&netns, "link add eth0 mtu 1400 address 02:00:00:00:00:07 type veth peer name p0");
    ip(&netns, &format!("link set p0 netns {}", other.path_for_others()));
    ip(&other, "link set p0 up");
    ip(&netns, "link set eth0 up");
    ip(&netns, "address add 10.9.0.2/24 dev eth0");
    ip(&netns, "address add fd09::2/64 dev eth0");
    ip(&netns, "address add 10.8.8.8/32 dev lo");
    ip(&netns, "route add default via 10.9.0.1");
    ip(&netns, "route add 10.7.0.0/16 dev eth0 table 77");
    ip(&netns, "rule add from 10.9.0.2 lookup 77");
    ip(&netns, "neighbour add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0");
    let network = Network::scan(&netns).unwrap();
    let [link] = &network.links[..] else { panic!("{:?}", network.links) };
    assert_eq!((link.name.as_str(), link.kind.as_str(), link.mtu), ("eth0", "veth", 1400));
    assert!(link.up && !link.no_arp && !link.has_ingress && link.mac == [2, 0, 0, 0, 0, 7]);
    // 10.9.0.2, 10.8.8.8, fd09::2 and the link's own of IPv6.
    assert_eq!(network.addresses.len(), 4, "{:?}", network.addresses);
    let last = network.routes.last().unwrap();
    assert!(Attributes(&last[RTMSG..]).any(|a| a.kind == libc::RTA_GATEWAY), "gateways come last");
    assert_eq!((network.rules.len(), network.neighbours.len()), (1, 1));
}

#[test]
fn what_carries_no_frames_is_refused_by_name_and_fallbacks_are_not() {
    let netns = Netns::create().unwrap();
    ip(&netns, "tuntap add mode tun name tun0");
    let text = Network::scan(&netns).unwrap_err().to_string();
    assert!(
        text.contains("link tun0 (tun) cannot be passed") && text.contains("no Ethernet frames"),
        "{text}"
    );
    ip(&netns, "link del tun0");
    ip(&netns, "link add eth0 type veth peer name eth1");
    ip(&netns, "link add mv0 link eth0 type macvlan mode bridge");
    let text = Network::scan(&netns).unwrap_err().to_string();
    assert!(text.contains("link mv0 (macvlan)") && text.contains("stands on eth0"), "{text}");
}

#[test]
fn a_bridge_carries_what_its_ports_carry() {
    let netns = Netns::create().unwrap();
    ip(&netns, "link add br0 type bridge");
    ip(&netns, "tuntap add mode tap name port0");
    ip(&netns, "link set port0 master br0");
    let network = Network::scan(&netns).unwrap();
    let names: Vec<_> = network.links.iter().map(|l| (l.name.as_str(), l.kind.as_str())).collect();
    assert_eq!(names, [("br0", "bridge")]);
}
