//! The network of a pod: what is in the namespace that it is given is what the container has.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Proc, Run, Test, signal_process, stretched, wait_for_exit};
use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};

pub(crate) const TESTS: &[Test] = &[
    Test::common("network::links_are_as_in_the_namespace", links_are_as_in_the_namespace),
    Test::common("network::tcp_both_ways", tcp_both_ways),
    Test::common("network::counters_are_true", counters_are_true),
    Test::common("network::rules_and_neighbours", rules_and_neighbours),
    Test::common("network::large_packets", large_packets),
    Test::common("network::macvlan", macvlan),
    Test::common("network::ipvlan", ipvlan),
    Test::common("network::vlan", vlan),
    Test::common("network::bridge_and_its_port", bridge_and_its_port),
    Test::common("network::two_links", two_links),
    Test::common("network::a_hook_brings_the_link", a_hook_brings_the_link),
    Test::common("network::files_of_names", files_of_names),
    Test::common("network::localhost_is_forwarded", localhost_is_forwarded),
    Test::bulkhead("network::shim_killed", "runc leaves nothing to take back", shim_killed),
    Test::bulkhead("network::namespace_is_not_there", WORDS, namespace_is_not_there),
    Test::bulkhead(
        "network::namespace_of_the_host",
        "runc gives the host's links away",
        namespace_of_the_host,
    ),
    Test::bulkhead("network::link_without_frames", "runc passes any link", link_without_frames),
    Test::bulkhead("network::more_links_than_cards", "runc has no cards", more_links_than_cards),
];

const WORDS: &str = "runc has other words for it";
const PATIENCE: Duration = Duration::from_secs(30);
const HOST4: &str = "10.66.0.1";
const HOST6: &str = "fd66::1";

/// A network namespace of a pod, as an administrator or a plugin prepares it, and our side of it.
struct Pod {
    name: &'static str,
    before: Vec<String>,
}

fn ip(line: &str) -> Result<String> {
    let args: Vec<&str> = line.split_whitespace().collect();
    Ok(Run::new("ip").args(&args).output()?.ok()?.out())
}

impl Pod {
    /// An empty namespace.
    fn empty() -> Result<Self> {
        ip("netns add pod")?;
        let pod = Self { name: "pod", before: Vec::new() };
        pod.ip("link set lo up")?;
        Ok(pod)
    }

    /// One with a veth pair: `eth0` there, `h0` here.
    fn with_veth() -> Result<Self> {
        let pod = Self::empty()?;
        ip("link add h0 mtu 1400 type veth peer name eth0 mtu 1400 address 02:66:00:00:00:02 netns pod")?;
        pod.address("h0", "eth0")?;
        Ok(pod)
    }

    /// Gives both sides their addresses, and sets them up.
    fn address(&self, here: &str, there: &str) -> Result<()> {
        ip(&format!("address add {HOST4}/24 dev {here}"))?;
        ip(&format!("address add {HOST6}/64 dev {here} nodad"))?;
        ip(&format!("link set {here} up"))?;
        self.ip(&format!("address add 10.66.0.2/24 dev {there}"))?;
        self.ip(&format!("address add fd66::2/64 dev {there} nodad"))?;
        self.ip(&format!("link set {there} up"))?;
        self.ip(&format!("route add default via {HOST4} dev {there}"))?;
        self.ip(&format!("route add default via {HOST6} dev {there}"))?;
        Ok(())
    }

    fn ip(&self, line: &str) -> Result<String> {
        ip(&format!("-n {} {line}", self.name))
    }

    fn flag(&self) -> String {
        format!("network:/run/netns/{}", self.name)
    }

    /// The namespace's links and disciplines.
    fn inventory(&self) -> Result<Vec<String>> {
        let links: Value = serde_json::from_str(&self.ip("-j link")?)?;
        let names = links.as_array().into_iter().flatten().map(|l| format!("link {}", l["ifname"]));
        let disciplines = Run::new("tc").args(["-n", self.name, "qdisc"]).output()?.ok()?.out();
        let ours = disciplines.lines().filter(|l| l.contains("ingress") || l.contains("clsact"));
        Ok(names.chain(ours.map(str::to_owned)).collect())
    }

    /// To be called before the first container.
    fn note(mut self) -> Result<Self> {
        self.before = self.inventory()?;
        Ok(self)
    }

    /// Waits for the end of all that serves this test, sees that the namespace is as it was, and removes it.
    fn finish(self, t: &Context) -> Result<()> {
        wait_for_shims(t)?;
        let after = self.inventory()?;
        ensure!(after == self.before, "the namespace had {:?} and has {after:?}", self.before);
        Ok(())
    }

    /// Bytes received and sent by a link.
    fn counters(&self, link: &str) -> Result<(u64, u64)> {
        let text = self.ip(&format!("-j -s link show {link}"))?;
        let stats = serde_json::from_str::<Value>(&text)?[0]["stats64"].clone();
        let bytes = |way: &str| stats[way]["bytes"].as_u64().context("no counter");
        Ok((bytes("rx")?, bytes("tx")?))
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // With it go its links, and their other ends here. `ip netns` leaves its directory mounted.
        let _ = ip(&format!("netns delete {}", self.name));
        let _ = unmount("/run/netns", UnmountFlags::DETACH);
        let _ = std::fs::remove_dir("/run/netns");
        let _ = Run::new("ip").args(["link", "delete", "h0"]).output();
    }
}

fn wait_for_shims(t: &Context) -> Result<()> {
    for process in t.processes() {
        let Ok(pidfd) = process.pidfd() else { continue };
        wait_for_exit(&pidfd, Duration::from_secs(30)).with_context(|| process.to_string())?;
    }
    Ok(())
}

const SHOW: &str = "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu; ip address show eth0; \
                    ip route; ip -6 route; ls /sys/class/net | grep -v lo";

fn expect(seen: &str, wanted: &[&str]) -> Result<()> {
    for text in wanted {
        ensure!(seen.contains(text), "{text:?} is not in:\n{seen}");
    }
    Ok(())
}

fn links_are_as_in_the_namespace(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?.note()?;
    let seen = t.sh(&["--with-ns", &pod.flag()], SHOW)?;
    expect(
        &seen,
        &[
            "02:66:00:00:00:02\n1400\n",
            "inet 10.66.0.2/24",
            "inet6 fd66::2/64",
            "inet6 fe80::",
            "default via 10.66.0.1 dev eth0",
            "10.66.0.0/24 dev eth0",
            "default via fd66::1 dev eth0",
        ],
    )?;
    ensure!(seen.ends_with("\neth0"), "another link is there:\n{seen}");
    let unready = seen.lines().find(|l| l.contains("fd66::2") && l.contains("tentative"));
    ensure!(unready.is_none(), "an address is not usable yet:\n{seen}");
    pod.finish(t)
}

/// Says "hello" to whoever connects from the container, and answers what they said.
fn talk(run: &Proc, listener: &TcpListener) -> Result<String> {
    run.wait_for_readable(listener.as_fd())?;
    let (mut stream, _) = listener.accept().context("accept")?;
    stream.set_read_timeout(Some(stretched(PATIENCE)))?;
    stream.write_all(b"hello\n")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut said = String::new();
    stream.read_to_string(&mut said).context("read what the pod says")?;
    Ok(said)
}

/// What the web server of the container says.
fn page(address: &str, path: &str) -> Result<Vec<u8>> {
    let address = address.parse().with_context(|| format!("{address} is no address"))?;
    let mut stream = TcpStream::connect_timeout(&address, stretched(PATIENCE))
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(stretched(PATIENCE)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut page = Vec::new();
    stream.read_to_end(&mut page).with_context(|| format!("read from {address}"))?;
    Ok(page)
}

/// A connection from the container to us, and one from us to it, with either version of IP.
fn tcp_works(t: &Context, pod: &Pod) -> Result<()> {
    let four = TcpListener::bind((HOST4, 0)).context("listen")?;
    let six = TcpListener::bind((HOST6, 0)).context("listen")?;
    let script = format!(
        "httpd -p 8080 -h /etc && \
         echo from the pod | nc {HOST4} {} && echo from the pod | nc {HOST6} {} && \
         echo served && sleep 1000",
        four.local_addr()?.port(),
        six.local_addr()?.port()
    );
    let run = t.run(&["--rm", "--with-ns", &pod.flag()], "c", &["sh", "-c", &script]).spawn()?;
    for listener in [&four, &six] {
        let said = talk(&run, listener)?;
        ensure!(said == "from the pod\n", "the pod said {said:?}");
    }
    run.wait_for_text("hello\nhello\nserved")?;
    for address in ["10.66.0.2:8080", "[fd66::2]:8080"] {
        let page = page(address, "/passwd")?;
        let page = String::from_utf8_lossy(&page);
        ensure!(page.contains("alice:x:1000"), "{address} serves {page:?}");
    }
    t.ctr_ok(&["task", "kill", "-s", "KILL", "c"])?;
    run.wait()?.expect_code(137)?;
    Ok(())
}

fn tcp_both_ways(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?.note()?;
    tcp_works(t, &pod)?;
    pod.finish(t)
}

/// Moves two megabytes each way, and answers by how much the counters of `eth0` grew: received, sent.
fn transfer(t: &Context, pod: &Pod) -> Result<(u64, u64)> {
    let listener = TcpListener::bind((HOST4, 0)).context("listen")?;
    let script = format!(
        "dd if=/dev/urandom of=/data bs=1M count=2 2>/dev/null; httpd -p 8080 -h /; \
         nc {HOST4} {} </dev/null | md5sum; echo got it; sleep 1000",
        listener.local_addr()?.port()
    );
    let before = pod.counters("eth0")?;
    let run = t.run(&["--rm", "--with-ns", &pod.flag()], "c", &["sh", "-c", &script]).spawn()?;
    run.wait_for_readable(listener.as_fd())?;
    let (mut stream, _) = listener.accept()?;
    stream.write_all(&vec![0; 2 << 20])?;
    drop(stream);
    // md5sum of two megabytes of zeros.
    run.wait_for_text("b2d1236c286a3c0704224fe4105eca49  -\ngot it")?;
    let page = page("10.66.0.2:8080", "/data")?;
    ensure!(page.len() > 2 << 20, "the page has {} bytes", page.len());
    let after = pod.counters("eth0")?;
    t.ctr_ok(&["task", "kill", "-s", "KILL", "c"])?;
    run.wait()?.expect_code(137)?;
    Ok((after.0 - before.0, after.1 - before.1))
}

fn counters_are_true(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?.note()?;
    let (received, sent) = transfer(t, &pod)?;
    // Headers and acknowledgements are counted too, retransmissions may be.
    let range = (2 << 20)..(3 << 20);
    ensure!(range.contains(&received) && range.contains(&sent), "received {received}, sent {sent}");
    pod.finish(t)
}

fn rules_and_neighbours(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?;
    pod.ip("route add 10.77.0.0/16 via 10.66.0.1 dev eth0 table 77")?;
    pod.ip("route add blackhole 10.78.0.0/16")?;
    pod.ip("rule add from 10.66.0.2 lookup 77 priority 700")?;
    pod.ip("neighbour add 10.66.0.9 lladdr 02:66:00:00:00:09 dev eth0")?;
    pod.ip("address add 10.99.9.9/32 dev lo")?;
    let pod = pod.note()?;
    let script = "ip rule; ip route show table 77; ip route; cat /proc/net/arp; ip address show lo";
    let seen = t.sh(&["--with-ns", &pod.flag()], script)?;
    expect(
        &seen,
        &[
            "from 10.66.0.2 lookup 77",
            "10.77.0.0/16 via 10.66.0.1 dev eth0",
            "10.78.0.0/16",
            "02:66:00:00:00:09",
            "10.99.9.9/32",
        ],
    )?;
    pod.finish(t)
}

fn large_packets(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?;
    ip("link set h0 mtu 9000")?;
    pod.ip("link set eth0 mtu 9000")?;
    let pod = pod.note()?;
    // Without fragments only a link of that size carries it.
    let script = "cat /sys/class/net/eth0/mtu; ping -c 1 -W 20 -s 8900 10.66.0.1";
    let seen = t.sh(&["--with-ns", &pod.flag()], script)?;
    expect(&seen, &["9000\n", "1 packets received"])?;
    transfer(t, &pod)?;
    pod.finish(t)
}

/// A pair of links here, with our address on the one; on the other stands the pod's link of some kind. `None`
/// where this kernel has no such kind.
fn stacked(kind: &str) -> Result<Option<Pod>> {
    ip("link add h0 type veth peer name h1")?;
    ip("link set h1 up")?;
    let made = Run::new("ip").args(["link", "add", "link", "h1", "name", "up0", "type"]);
    let made = made.args(kind.split(' ')).output()?;
    if made.err().contains("Unknown device type") {
        eprintln!("this kernel has no {kind}");
        ip("link delete h0")?;
        return Ok(None);
    }
    made.ok()?;
    let pod = Pod::empty()?;
    ip("link set up0 netns pod name eth0")?;
    Ok(Some(pod))
}

fn macvlan(t: &mut Context) -> Result<()> {
    let Some(pod) = stacked("macvlan mode bridge")? else { return Ok(()) };
    pod.address("h0", "eth0")?;
    let pod = pod.note()?;
    tcp_works(t, &pod)?;
    pod.finish(t)
}

fn ipvlan(t: &mut Context) -> Result<()> {
    let Some(pod) = stacked("ipvlan mode l2")? else { return Ok(()) };
    pod.address("h0", "eth0")?;
    let pod = pod.note()?;
    tcp_works(t, &pod)?;
    pod.finish(t)
}

fn vlan(t: &mut Context) -> Result<()> {
    let Some(pod) = stacked("vlan id 66")? else { return Ok(()) };
    ip("link add link h0 name h0.66 type vlan id 66")?;
    ip("link set h0 up")?;
    pod.address("h0.66", "eth0")?;
    let pod = pod.note()?;
    tcp_works(t, &pod)?;
    pod.finish(t)
}

/// The address is the bridge's, and the veth its port.
fn bridge_and_its_port(t: &mut Context) -> Result<()> {
    let pod = Pod::empty()?;
    ip("link add h0 type veth peer name port0 netns pod")?;
    pod.ip("link add eth0 type bridge forward_delay 0")?;
    pod.ip("link set port0 master eth0 up")?;
    pod.address("h0", "eth0")?;
    let pod = pod.note()?;
    tcp_works(t, &pod)?;
    pod.finish(t)
}

fn two_links(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?;
    ip("link add h1 type veth peer name net1 address 02:66:00:00:01:01 netns pod")?;
    pod.ip("address add 10.67.0.2/24 dev net1")?;
    pod.ip("link set net1 up")?;
    let pod = pod.note()?;
    let script = "cat /sys/class/net/eth0/address /sys/class/net/net1/address; ip route";
    let seen = t.sh(&["--with-ns", &pod.flag()], script)?;
    expect(
        &seen,
        &["02:66:00:00:00:02\n02:66:00:00:01:01\n", "10.66.0.0/24 dev eth0", "10.67.0.0/24 dev net1"],
    )?;
    pod.finish(t)
}

/// As a client's network comes: the container's namespace is its own, and a hook on the host finds it by the
/// pid that it is told.
fn a_hook_brings_the_link(t: &mut Context) -> Result<()> {
    let listener_here = "10.66.0.1";
    let hook = format!(
        "pid=$(tr -d ' \n' | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); \
         in=\"nsenter -t $pid -n ip\"; set -e; \
         ip link add h0 type veth peer name eth0 address 02:66:00:00:00:02 netns $pid; \
         ip address add {listener_here}/24 dev h0; ip link set h0 up; \
         $in address add 10.66.0.2/24 dev eth0; $in link set eth0 up; \
         $in route add default via {listener_here}"
    );
    let script = "cat /sys/class/net/eth0/address; ip address show eth0; ip route; ping -c 1 -W 20 10.66.0.1";
    let run = t.run_spec("c", &["sh", "-c", script], |spec| {
        spec["hooks"] = json!({ "createRuntime": [{
            "path": "/bin/sh",
            "args": ["sh", "-c", hook],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        }] });
    })?;
    let seen = run.output()?.ok()?.out();
    expect(
        &seen,
        &["02:66:00:00:00:02", "inet 10.66.0.2/24", "default via 10.66.0.1", "1 packets received"],
    )?;
    // With the namespace, which had no name, its links go.
    wait_for_shims(t)?;
    Ok(())
}

/// Names come as files, as Kubernetes and nerdctl bring them.
fn files_of_names(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?.note()?;
    let mut flags = vec!["--with-ns".to_owned(), pod.flag(), "--hostname".into(), "lighthouse".into()];
    for (name, text) in [
        ("resolv.conf", "nameserver 10.66.0.53\nsearch ships.test\n"),
        ("hosts", "127.0.0.1 localhost\n10.66.0.1 harbour\n"),
        ("hostname", "lighthouse\n"),
    ] {
        let file = t.write(name, text)?;
        flags.push("--mount".into());
        flags.push(format!("type=bind,src={},dst=/etc/{name},options=rbind:rw", file.display()));
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let script = "cat /etc/resolv.conf; cat /etc/hostname; hostname; ping -c 1 -W 20 harbour";
    let seen = t.sh(&flags, script)?;
    expect(&seen, &["nameserver 10.66.0.53", "lighthouse\nlighthouse\n", "1 packets received"])?;
    pod.finish(t)
}

/// As containerd forwards a port: it dials `localhost` in the pod's namespace on the host.
fn localhost_is_forwarded(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?.note()?;
    let script = "dd if=/dev/urandom of=/data bs=1M count=2 2>/dev/null; md5sum </data; \
                  httpd -p 127.0.0.1:8080 -h /; httpd -p [::1]:8081 -h /; echo up; sleep 1000";
    let run = t.run(&["--rm", "--with-ns", &pod.flag()], "c", &["sh", "-c", script]).spawn()?;
    run.wait_for_text("up")?;
    let sum = String::from_utf8_lossy(&run.stdout_so_far()).split(' ').next().unwrap_or_default().to_owned();
    let busybox = std::env::var("BULKHEAD_TEST_BUSYBOX").unwrap_or_else(|_| "/bin/busybox".into());
    let fetch = |url: &str| {
        let script = format!("{busybox} wget -q -O - http://{url}/data | {busybox} md5sum");
        Run::new("nsenter").args(["--net=/run/netns/pod", "sh", "-c", &script]).output()
    };
    for url in ["127.0.0.1:8080", "[::1]:8081"] {
        let fetched = fetch(url)?.ok()?.out();
        ensure!(fetched.starts_with(&sum), "{url} gives {fetched}, the file is {sum}");
    }
    let nobody = Run::new("nsenter").args(["--net=/run/netns/pod", &busybox, "wget", "-q", "-O", "-"]);
    nobody.arg("http://127.0.0.1:9999/").output()?.expect_failure()?;
    t.ctr_ok(&["task", "kill", "-s", "KILL", "c"])?;
    run.wait()?.expect_code(137)?;
    pod.finish(t)
}

/// What the shim could not take back itself, containerd's `delete` does.
fn shim_killed(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?.note()?;
    t.start_sleeper(&["--with-ns", &pod.flag()], "c")?;
    ensure!(pod.inventory()? != pod.before, "nothing is joined to the link");
    let mut events = t.events()?;
    let shim = t.process("containerd-shim-")?;
    let fd = signal_process(shim.pid, rustix::process::Signal::KILL, |pid| pid == shim.pid)?;
    wait_for_exit(&fd, PATIENCE)?;
    events.wait_exit("c", 60)?;
    t.ctr().args(["task", "delete", "--force", "c"]).output()?;
    t.ctr_ok(&["container", "delete", "c"])?;
    pod.finish(t)
}

/// `ctr run` with this namespace, which must fail with these words and leave nothing.
fn refused(t: &Context, flag: &str, words: &[&str]) -> Result<()> {
    t.run_rm(&["--with-ns", flag], &["true"])?.expect_failure()?.expect_stderr(words)?;
    Ok(())
}

fn namespace_is_not_there(t: &mut Context) -> Result<()> {
    let missing = t.dir().join("no-such-netns");
    refused(
        t,
        &format!("network:{}", missing.display()),
        &["cannot open the network namespace", "no-such-netns", "No such file or directory"],
    )?;
    let file = t.write("a-file", "")?;
    refused(t, &format!("network:{}", file.display()), &["a-file", "it is no network namespace"])
}

fn namespace_of_the_host(t: &mut Context) -> Result<()> {
    let pid = t.node().pid().context("containerd runs")?;
    refused(t, &format!("network:/proc/{pid}/ns/net"), &["is the network namespace of the host"])
}

fn link_without_frames(t: &mut Context) -> Result<()> {
    let pod = Pod::with_veth()?;
    pod.ip("tuntap add mode tun name tun7")?;
    let pod = pod.note()?;
    refused(
        t,
        &pod.flag(),
        &["link tun7 (tun) cannot be passed to a virtual machine", "no Ethernet frames"],
    )?;
    pod.finish(t)
}

fn more_links_than_cards(t: &mut Context) -> Result<()> {
    t.set_config("network", "spare_cards", 0.into())?;
    let run = t.run_spec("c", &["true"], |spec| {
        let add = "pid=$(tr -d ' \n' | sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); \
                   nsenter -t $pid -n ip link add eth0 type veth peer name eth1";
        spec["hooks"] = json!({ "createRuntime": [{
            "path": "/bin/sh",
            "args": ["sh", "-c", add],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        }] });
    })?;
    run.output()?.expect_failure()?.expect_stderr(&["link eth", "raise network.spare_cards"])?;
    Ok(())
}
