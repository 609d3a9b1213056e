//! PID 1 of the guests in this crate's tests: dials the host and does what it is told.
//! Knows nothing of the agent or its protocol; one command is one line, and so is its answer.

use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::fd::AsRawFd,
};

use nix::{
    mount::{MsFlags, mount, umount},
    sys::{
        reboot::{RebootMode, reboot},
        socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket},
    },
};

const HOST_CID: u32 = 2;
const PORT: u32 = 1024;

fn main() {
    let error = serve().err();
    // Seen on the console, which is all that is left.
    eprintln!("test guest: {error:?}");
    let _ = reboot(RebootMode::RB_AUTOBOOT);
}

/// As the agent does: Linux gives a dial 2 s, in which a host that translates several machines may not get to it.
#[allow(unsafe_code)]
fn be_patient(socket: i32) -> io::Result<()> {
    // linux/vm_sockets.h: SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD, which takes a struct timeval.
    const CONNECT_TIMEOUT: libc::c_int = 6;
    let limit = libc::timeval { tv_sec: 60, tv_usec: 0 };
    let size = size_of_val(&limit) as libc::socklen_t;
    // SAFETY: the kernel reads one timeval, which outlives the call.
    match unsafe {
        libc::setsockopt(socket, libc::AF_VSOCK, CONNECT_TIMEOUT, (&raw const limit).cast(), size)
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// As the agent does (agent/src/devices.rs): looks again for devices where the kernel found none.
fn find_the_rest() -> io::Result<()> {
    let sys = "/devices";
    fs::create_dir(sys)?;
    mount(Some("sysfs"), sys, Some("sysfs"), MsFlags::empty(), None::<&str>)?;
    let bus = format!("{sys}/bus/platform");
    for number in 0.. {
        let place = format!("{bus}/devices/virtio-mmio.{number}");
        if !fs::exists(&place)? {
            break;
        }
        if !fs::exists(format!("{place}/driver"))? {
            match fs::write(format!("{bus}/drivers/virtio-mmio/bind"), format!("virtio-mmio.{number}")) {
                // Still empty.
                Err(e) if e.raw_os_error() == Some(nix::libc::ENODEV) => {}
                bound => bound?,
            }
        }
    }
    Ok(umount(sys)?)
}

fn serve() -> io::Result<()> {
    let host = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    be_patient(host.as_raw_fd())?;
    connect(host.as_raw_fd(), &VsockAddr::new(HOST_CID, PORT))?;
    let mut host = fs::File::from(host);
    let uptime = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    writeln!(host, "hello {}", uptime.tv_sec() * 1_000_000 + uptime.tv_nsec() / 1_000)?;
    find_the_rest()?;
    for line in BufReader::new(host.try_clone()?).lines() {
        let line = line?;
        let mut words = line.split(' ');
        let mut word = || words.next().unwrap_or_default();
        let answer = match word() {
            "mount" => {
                let (kind, source, target) = (word(), word(), word());
                fs::create_dir_all(target)
                    .and_then(|()| {
                        Ok(mount(Some(source), target, Some(kind), MsFlags::empty(), None::<&str>)?)
                    })
                    .map(|()| String::new())
            }
            "read" => fs::read_to_string(word()),
            "write" => fs::write(word(), word()).map(|()| String::new()),
            "copy" => fs::read(word()).and_then(|data| fs::write(word(), data)).map(|()| String::new()),
            "fill" => {
                let (path, mib) = (word(), word().parse::<usize>().map_err(io::Error::other)?);
                fs::File::create(path).and_then(|mut file| {
                    (0..mib).try_for_each(|_| file.write_all(&[1; 1 << 20])).map(|()| String::new())
                })
            }
            "remove" => fs::remove_file(word()).map(|()| String::new()),
            "list" => fs::read_dir(word()).map(|entries| {
                let mut names: Vec<_> =
                    entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
                names.sort();
                names.join(" ")
            }),
            // The end of PID 1 is a panic.
            "panic" => {
                eprintln!("test guest: here it ends");
                std::process::exit(7)
            }
            "restart" => return Ok(()),
            other => Err(io::Error::other(format!("unknown command {other:?}"))),
        };
        let answer = answer.map_or_else(|e| format!("error {e}"), |text| format!("ok {text}"));
        writeln!(host, "{}", answer.trim_end().replace('\n', "\\n"))?;
    }
    Ok(())
}
