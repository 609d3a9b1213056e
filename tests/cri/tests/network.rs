//! The network of a pod, as CNI makes it: its address, who reaches it and whom it reaches, forwarded ports.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Pod, Proc, Run, Test, stretched};
use serde_json::{Value, json};

use crate::{SLEEPER, pod::inspect};

pub(crate) const TESTS: &[Test] = &[
    Test::common("network::a_pod_has_the_address_that_is_told", address),
    Test::common("network::pods_the_node_and_each_other_are_reached", reached),
    Test::common("network::containers_share_localhost", localhost),
    Test::common("network::ports_are_forwarded", forwarded),
    Test::bulkhead(
        "network::ports_of_ipv6_are_forwarded",
        "containerd finds ::1 only where the machine's own /etc/hosts calls it localhost",
        forwarded_six,
    ),
    Test::common("network::counters_of_statsp_are_true", counters),
];

/// The node's side of the bridge, as CNI's configuration in the harness has it.
const GATEWAY: &str = "10.88.0.1";
const PATIENCE: Duration = Duration::from_secs(30);
const MEGABYTES: u64 = 2;

/// The pod's address.
fn ip(t: &Context<'_>, pod: &Pod) -> Result<String> {
    let status = inspect(t, "inspectp", &pod.id)?;
    let ip = status["status"]["network"]["ip"].as_str().filter(|ip| ip.starts_with("10.88.0."));
    Ok(ip.with_context(|| format!("no address in {status}"))?.to_owned())
}

/// Serves the files of a directory; the server listens when this returns.
fn serve(t: &Context<'_>, id: &str, listen: &str, files: &str) -> Result<()> {
    t.exec_in(id, &format!("httpd -p {listen} -h {files} </dev/null >/dev/null 2>&1"))?;
    Ok(())
}

/// What the web server at `address` says.
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

/// Whether the web server at `address` is the pod `name`.
fn is_pod(address: &str, name: &str) -> Result<()> {
    let page = page(address, "/hostname")?;
    let page = String::from_utf8_lossy(&page);
    ensure!(page.starts_with("HTTP/1.") && page.contains(" 200 "), "{address} says {page:?}");
    ensure!(page.ends_with(&format!("\r\n\r\n{name}\n")), "{address} is not {name}, it says {page:?}");
    Ok(())
}

fn address(t: &mut Context<'_>) -> Result<()> {
    let pod =
        t.pod("p", |p| p["dns_config"] = json!({"servers": [GATEWAY], "searches": ["pods.example"]}))?;
    let ip = ip(t, &pod)?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    let links = t.exec_in(&a, "ls /sys/class/net")?;
    let links: Vec<&str> = links.lines().filter(|link| ["eth0", "lo"].contains(link)).collect();
    ensure!(links == ["eth0", "lo"], "{links:?}");
    let seen = t.exec_in(&a, "ip -4 address show dev eth0")?;
    ensure!(seen.contains(&format!("inet {ip}/24 ")) && seen.contains("UP"), "{seen}");
    let routes = t.exec_in(&a, "ip route")?;
    ensure!(routes.contains(&format!("default via {GATEWAY} dev eth0")), "{routes}");
    ensure!(routes.contains("10.88.0.0/24 dev eth0"), "{routes}");
    let resolv = t.exec_in(&a, "cat /etc/resolv.conf")?;
    ensure!(resolv.lines().any(|line| line == format!("nameserver {GATEWAY}")), "{resolv}");
    // A further container finds the same.
    let b = t.run_in(&pod, "b", SLEEPER)?;
    ensure!(t.exec_in(&b, "ip -4 address show dev eth0")? == seen);
    // The node knows the card by the address that the pod has.
    t.exec_in(&a, &format!("ping -c 1 -W 30 {GATEWAY}"))?;
    let mac = t.exec_in(&a, "cat /sys/class/net/eth0/address")?;
    let known = Run::new("ip").args(["neighbour", "show", &ip]).output()?.ok()?.out();
    ensure!(known.contains(&mac), "{known}, not {mac}");
    t.remove_pod(&pod)
}

fn reached(t: &mut Context<'_>) -> Result<()> {
    let (p, q) = (t.pod("p", |_| {})?, t.pod("q", |_| {})?);
    let a = t.run_in(&p, "a", SLEEPER)?;
    let b = t.run_in(&q, "b", SLEEPER)?;
    for (id, pod, name) in [(&a, &p, "p"), (&b, &q, "q")] {
        serve(t, id, "8080", "/etc")?;
        is_pod(&format!("{}:8080", ip(t, pod)?), name)?;
    }
    for (from, to, name) in [(&a, &q, "q"), (&b, &p, "p")] {
        let seen = t.exec_in(from, &format!("wget -q -O - http://{}:8080/hostname", ip(t, to)?))?;
        ensure!(seen == name, "{seen:?} instead of {name}");
    }
    t.remove_pod(&p)?;
    t.remove_pod(&q)
}

fn localhost(t: &mut Context<'_>) -> Result<()> {
    let (p, q) = (t.pod("p", |_| {})?, t.pod("q", |_| {})?);
    let a = t.run_in(&p, "a", SLEEPER)?;
    let b = t.run_in(&p, "b", SLEEPER)?;
    let other = t.run_in(&q, "other", SLEEPER)?;
    serve(t, &a, "127.0.0.1:8080", "/etc")?;
    let get = "wget -q -O - http://127.0.0.1:8080/hostname";
    ensure!(t.exec_in(&b, get)? == "p");
    // Nobody else: neither by the pod's address nor as another pod's localhost.
    let refused = t.exec_in(&other, &format!("nc -w 5 {} 8080 </dev/null", ip(t, &p)?));
    ensure!(refused.is_err(), "localhost of a pod is reached by its address");
    ensure!(t.exec_in(&other, get).is_err(), "localhost of a pod is that of another one");
    t.remove_pod(&p)?;
    t.remove_pod(&q)
}

/// `crictl port-forward` of a port, and the address on this side.
fn forward(t: &Context<'_>, pod: &Pod, port: u16) -> Result<(Proc, String)> {
    let forward = t.crictl()?.args(["port-forward", &pod.id, &format!(":{port}")]).spawn()?;
    let end = format!(" -> {port}\n");
    forward.wait_for_text(&end)?;
    let said = String::from_utf8_lossy(&forward.stdout_so_far()).into_owned();
    let here = said.lines().find_map(|line| line.strip_prefix("Forwarding from ")?.split(' ').next());
    let here = here.filter(|here| here.starts_with("127.0.0.1:"));
    let here = here.with_context(|| format!("no address of IPv4 in {said:?}"))?.to_owned();
    Ok((forward, here))
}

fn forwarded(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    serve(t, &a, "127.0.0.1:8080", "/etc")?;
    serve(t, &a, "8082", "/etc")?;
    for port in [8080, 8082] {
        let (_forward, here) = forward(t, &pod, port)?;
        // A connection does not use it up.
        for _ in 0..2 {
            is_pod(&here, "p").with_context(|| format!("port {port}"))?;
        }
    }
    // Nobody listens there: the connection ends, without a byte.
    let (_forward, here) = forward(t, &pod, 8089)?;
    let nothing = page(&here, "/hostname").unwrap_or_default();
    ensure!(nothing.is_empty(), "{:?}", String::from_utf8_lossy(&nothing));
    t.remove_pod(&pod)
}

fn forwarded_six(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    serve(t, &a, "[::1]:8081", "/etc")?;
    let (_forward, here) = forward(t, &pod, 8081)?;
    is_pod(&here, "p")?;
    t.remove_pod(&pod)
}

/// Bytes that the pod has received and sent, as CRI says.
fn figures(t: &Context<'_>, pod: &Pod) -> Result<(u64, u64)> {
    let all: Value = serde_json::from_str(&t.crictl_ok(&["statsp", "--output", "json", "--id", &pod.id])?)?;
    let link = &all["stats"][0]["linux"]["network"]["defaultInterface"];
    let bytes = |way: &str| {
        let value = link[way]["value"].as_str().and_then(|text| text.parse().ok());
        value.with_context(|| format!("no {way} in {all}"))
    };
    Ok((bytes("rxBytes")?, bytes("txBytes")?))
}

fn counters(t: &mut Context<'_>) -> Result<()> {
    let pod = t.pod("p", |_| {})?;
    let listener = TcpListener::bind((GATEWAY, 0)).context("listen")?;
    let a = t.run_in(&pod, "a", SLEEPER)?;
    t.exec_in(&a, &format!("dd if=/dev/urandom of=/dev/shm/data bs=1M count={MEGABYTES} 2>/dev/null"))?;
    serve(t, &a, "8080", "/dev/shm")?;
    let ip = ip(t, &pod)?;

    let before = figures(t, &pod)?;
    let page = page(&format!("{ip}:8080"), "/data")?;
    ensure!(page.len() as u64 > MEGABYTES << 20, "the page has {} bytes", page.len());
    let after = figures(t, &pod)?;
    grown((before.1, after.1), MEGABYTES, "sent")?;
    grown((before.0, after.0), 0, "received")?;

    let script = format!("nc {GATEWAY} {} </dev/null | wc -c", listener.local_addr()?.port());
    let reader = t.crictl()?.args(["exec", &a, "sh", "-c", &script]).spawn()?;
    reader.wait_for_readable(listener.as_fd())?;
    let (mut stream, _) = listener.accept().context("accept")?;
    stream.write_all(&vec![0; (MEGABYTES << 20) as usize])?;
    drop(stream);
    ensure!(reader.wait()?.ok()?.out() == (MEGABYTES << 20).to_string());
    let last = figures(t, &pod)?;
    grown((after.0, last.0), MEGABYTES, "received")?;
    grown((after.1, last.1), 0, "sent")?;
    t.remove_pod(&pod)
}

/// A counter has grown by as many megabytes and less than one more: nothing is missing, nothing counted twice.
fn grown((before, after): (u64, u64), megabytes: u64, what: &str) -> Result<()> {
    let by = after.checked_sub(before).with_context(|| format!("{what}: {before}, then {after}"))?;
    ensure!(by > megabytes << 20 && by < (megabytes + 1) << 20, "{by} bytes {what} for {megabytes} MiB");
    Ok(())
}
