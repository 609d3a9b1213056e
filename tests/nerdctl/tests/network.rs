//! The network of a container, as nerdctl's hook and CNI make it.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use harness::{Context, Exit, Test, signal_process, stretched, wait_for_exit};

use crate::{SLEEPER, life::inspect};

pub(crate) const TESTS: &[Test] = &[
    Test::common("network::bridge_and_published_ports", bridge_and_ports),
    Test::common("network::none", none),
    Test::common("network::one_by_name_with_an_address_and_names", by_name),
    Test::bulkhead(
        "network::it_is_given_back_when_the_shim_is_killed",
        "runc's shim, killed, leaves nerdctl's logging program behind",
        given_back,
    ),
    Test::common("network::compose_brings_two_services_up", compose),
];

const PATIENCE: Duration = Duration::from_secs(30);

/// What the web server at `address` says.
fn page(address: &str, path: &str) -> Result<String> {
    let parsed = address.parse().with_context(|| format!("{address} is no address"))?;
    let mut stream = TcpStream::connect_timeout(&parsed, stretched(PATIENCE))
        .with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(stretched(PATIENCE)))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut page = String::new();
    stream.read_to_string(&mut page).with_context(|| format!("read from {address}"))?;
    Ok(page)
}

fn bridge_and_ports(t: &mut Context<'_>) -> Result<()> {
    let flags =
        ["-p", "127.0.0.1:8080:80", "--hostname", "web", "--dns", "192.0.2.53", "--dns-search", "ships.test"];
    t.nerdctl_start("box", &flags, SLEEPER)?;
    t.nerdctl_exec("box", "httpd -p 80 -h /etc </dev/null >/dev/null 2>&1")?;
    let ip = inspect(t, "box")?["NetworkSettings"]["IPAddress"].as_str().context("no address")?.to_owned();
    let seen = t.nerdctl_exec("box", "ip -4 address show dev eth0; ip route; cat /etc/resolv.conf")?;
    for part in [
        &format!("inet {ip}/24 "),
        "default via 10.4.0.1 dev eth0",
        "nameserver 192.0.2.53",
        "search ships.test",
    ] {
        ensure!(seen.contains(part), "no {part:?} in {seen}");
    }
    t.nerdctl_exec("box", "ping -c 1 -W 30 10.4.0.1")?;
    for address in [format!("{ip}:80"), "127.0.0.1:8080".into()] {
        let page = page(&address, "/hostname")?;
        ensure!(page.ends_with("web\n"), "{address}: {page}");
    }
    ensure!(t.nerdctl_ok(&["port", "box"])? == "80/tcp -> 127.0.0.1:8080");
    t.nerdctl_ok(&["rm", "-f", "box"])?;
    ensure!(TcpStream::connect(("127.0.0.1", 8080)).is_err(), "the port is free again");
    Ok(())
}

fn none(t: &mut Context<'_>) -> Result<()> {
    let seen = t.nerdctl_run(&["--rm", "--network", "none"], &["ls", "/sys/class/net"])?.output()?.ok()?;
    ensure!(seen.out() == "lo", "{seen}");
    Ok(())
}

fn by_name(t: &mut Context<'_>) -> Result<()> {
    t.nerdctl_ok(&["network", "create", "harbour", "--subnet", "10.77.0.0/24"])?;
    let flags = ["--network", "harbour", "--ip", "10.77.0.9"];
    t.nerdctl_start("pier", &flags, SLEEPER)?;
    let seen = t.nerdctl_exec("pier", "ip -4 address show dev eth0")?;
    ensure!(seen.contains("inet 10.77.0.9/24 "), "{seen}");
    t.nerdctl_start("ship", &["--network", "harbour", "--add-host", "moon:192.0.2.7"], SLEEPER)?;
    ensure!(t.nerdctl_exec("ship", "ping -c 1 -W 30 pier >/dev/null; echo $?")? == "0");
    ensure!(t.nerdctl_exec("ship", "grep -c '192.0.2.7.*moon' /etc/hosts")? == "1");
    // nerdctl has written it into the file of the one that was there before, behind its back.
    t.nerdctl_exec("pier", "until grep -qw ship /etc/hosts; do :; done")?;
    ensure!(t.nerdctl_exec("pier", "ping -c 1 -W 30 ship >/dev/null; echo $?")? == "0");
    for name in ["ship", "pier"] {
        t.nerdctl_ok(&["rm", "-f", name])?;
    }
    t.nerdctl_ok(&["network", "rm", "harbour"])?;
    Ok(())
}

/// An address that only nerdctl's hook gives back is free for the next container.
fn given_back(t: &mut Context<'_>) -> Result<()> {
    let mut events = t.events()?;
    let id = t.nerdctl_start("box", &["--ip", "10.4.0.77"], SLEEPER)?;
    let shim = t.process("containerd-shim-")?;
    let same = |pid| t.processes().iter().any(|p| p.pid == pid);
    wait_for_exit(&signal_process(shim.pid, rustix::process::Signal::KILL, same)?, Duration::from_secs(10))?;
    let status = events.wait_exit(&id, 60)?;
    ensure!(status == 137 || status == 255, "{status}");
    let next = t.nerdctl_run(&["--rm", "--ip", "10.4.0.77"], &["ip", "-4", "address"])?.output()?.ok()?;
    ensure!(next.out().contains("10.4.0.77/24"), "{next}");
    t.nerdctl_ok(&["rm", "-f", "box"])?;
    Ok(())
}

fn compose(t: &mut Context<'_>) -> Result<()> {
    let runtime = &t.settings().runtime_name;
    let image = harness::IMAGE;
    let file = t.write(
        "compose.yaml",
        format!(
            "services:\n  web:\n    image: {image}\n    pull_policy: never\n    runtime: {runtime}\n    \
             hostname: web\n    command: httpd -f -p 80 -h /etc\n  \
             client:\n    image: {image}\n    pull_policy: never\n    runtime: {runtime}\n    \
             depends_on: [web]\n    \
             command: sh -c 'until wget -q -O - http://web/hostname; do :; done; trap exit TERM; sleep 1000 & wait'\n"
        ),
    )?;
    let file = file.display().to_string();
    t.nerdctl_ok(&["compose", "-f", &file, "-p", "trade", "up", "-d"])?;
    let follow = t.nerdctl()?.args(["logs", "-f", "trade-client-1"]).spawn()?;
    follow.wait_for_text("web\n")?;
    let ps = t.nerdctl_ok(&["compose", "-f", &file, "-p", "trade", "ps", "--format", "{{.Name}} {{.State}}"]);
    if let Ok(ps) = ps {
        ensure!(ps.matches("running").count() == 2 || ps.contains("trade-web-1"), "{ps}");
    }
    t.nerdctl_ok(&["compose", "-f", &file, "-p", "trade", "down"])?;
    ensure!(follow.wait()?.exit == Exit::Code(0));
    ensure!(t.nerdctl_ok(&["ps", "-aq"])?.is_empty());
    Ok(())
}
