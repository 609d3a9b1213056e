//! What the guest uses of its machine: processors that are online, and memory that its kernel has to be told of.
//! Knows sysfs; must not know what either is wanted for.

use std::{
    fs::{self, File},
    io,
    os::unix::thread::JoinHandleExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_proto::agent::{ResizeRequest, ResizeResponse};
use nix::sys::{pthread::pthread_kill, signal::Signal};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    time::{Instant, timeout_at},
};

use crate::error::{Doing, Error, Result};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
/// How long the kernel may try to empty blocks of memory. One whose pages cannot be moved it would try for ever.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes the guest use what the host says.
pub(crate) async fn resize(request: &ResizeRequest) -> Result<ResizeResponse> {
    let memory = Path::new(MEMORY);
    if !(request.add.is_empty() && request.remove.is_empty()) {
        check_blocks(memory, request)?;
    }
    add(memory, request).await?;
    let vcpus = request.vcpus;
    let cpus = blocking(move || processors(Path::new(CPUS), vcpus)).await;
    let cpus = match cpus.doing(|| format!("use {vcpus} processors")) {
        Ok(cpus) => cpus,
        Err(error) => {
            remove(memory, &request.add, request.add.len()).await?;
            return Err(error);
        }
    };
    let removed = remove(memory, &request.remove, request.remove_count as usize).await?;
    Ok(ResizeResponse { vcpus: cpus, removed, ..Default::default() })
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(io::Error::other(e)))
}

/// Numbers in the kernel's lists, such as `0-2,5`.
fn numbers(list: &str) -> Vec<u32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u32>().ok()?..=last.parse().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// Brings processors online or offline until so many run; the first always does. Answers how many run. After an
/// error they are as they were.
fn processors(dir: &Path, wanted: u32) -> io::Result<u32> {
    let list = |name: &str| fs::read_to_string(dir.join(name)).map(|text| numbers(&text));
    let online = list("online")?;
    if wanted == 0 {
        return Ok(online.len() as u32);
    }
    let now = online.len() as u32;
    let (change, on): (Vec<u32>, bool) = if wanted > now {
        let present = list("present")?;
        if (present.len() as u32) < wanted {
            let text = format!("the machine has {}", present.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let off = present.into_iter().filter(|cpu| !online.contains(cpu));
        (off.take((wanted - now) as usize).collect(), true)
    } else {
        (online.into_iter().rev().take((now - wanted) as usize).collect(), false)
    };
    let switch = |cpu: u32, on: bool| {
        let file = dir.join(format!("cpu{cpu}/online"));
        fs::write(&file, if on { "1" } else { "0" })
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", file.display())))
    };
    for (n, &cpu) in change.iter().enumerate() {
        if let Err(error) = switch(cpu, on) {
            for &cpu in &change[..n] {
                let _ = switch(cpu, !on);
            }
            return Err(error);
        }
    }
    Ok(wanted)
}

fn check_blocks(memory: &Path, request: &ResizeRequest) -> Result<()> {
    let file = memory.join("block_size_bytes");
    let text = fs::read_to_string(&file).doing(|| format!("read {}", file.display()))?;
    let bytes = u64::from_str_radix(text.trim(), 16).unwrap_or(0);
    let whole = |address: &u64| bytes != 0 && address.is_multiple_of(bytes);
    if bytes == request.block_bytes && request.add.iter().chain(&request.remove).all(whole) {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "memory in blocks of {} bytes: the guest's kernel has blocks of {bytes}",
        request.block_bytes
    )))
}

/// A block of memory in sysfs.
fn block(memory: &Path, address: u64, bytes: u64) -> PathBuf {
    memory.join(format!("memory{}", address / bytes))
}

/// Uses all blocks, or none.
async fn add(memory: &Path, request: &ResizeRequest) -> Result<()> {
    let (dir, blocks, bytes) = (memory.to_owned(), request.add.clone(), request.block_bytes);
    let added = blocking(move || {
        let mut done = Vec::new();
        for address in blocks {
            let state = block(&dir, address, bytes).join("state");
            let used = match state.exists() {
                // It was in use before; the kernel keeps its description.
                true => fs::write(&state, "online"),
                // In use at once (`memhp_default_state`).
                false => fs::write(dir.join("probe"), format!("{address:#x}")),
            };
            if let Err(e) = used {
                return Ok((done, Some((address, e))));
            }
            done.push(address);
        }
        Ok((done, None))
    });
    let what = |address: u64| format!("use the memory at {address:#x}");
    let (done, failed) = added.await.doing(|| "use more memory".into())?;
    let Some((address, error)) = failed else { return Ok(()) };
    remove(memory, &done, done.len()).await?;
    Err(error).doing(|| what(address))
}

/// Leaves so many of these blocks alone, the first ones if that can be. Answers which.
async fn remove(memory: &Path, blocks: &[u64], count: usize) -> Result<Vec<u64>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    // Wakes the thread that waits for the kernel, and does nothing else.
    let _woken = signal(SignalKind::user_defined1()).doing(|| "handle a signal".into())?;
    let give_up = Instant::now() + PATIENCE;
    let mut removed = Vec::new();
    let bytes = block_bytes(memory)?;
    for &address in blocks {
        if removed.len() == count || Instant::now() >= give_up {
            break;
        }
        let state = block(memory, address, bytes).join("state");
        match offline(state, give_up).await {
            Ok(()) => removed.push(address),
            Err(error) => tracing::warn!(%error, "the memory at {address:#x} stays in use"),
        }
    }
    Ok(removed)
}

fn block_bytes(memory: &Path) -> Result<u64> {
    let file = memory.join("block_size_bytes");
    let text = fs::read_to_string(&file).doing(|| format!("read {}", file.display()))?;
    u64::from_str_radix(text.trim(), 16)
        .ok()
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| Error::Invalid(format!("{} says {text:?}, which is no size", file.display())))
}

/// Has the kernel empty a block. It does not come back before it has, or is interrupted.
async fn offline(state: PathBuf, give_up: Instant) -> io::Result<()> {
    let (tell, mut told) = oneshot::channel();
    let thread = std::thread::Builder::new().name("offline".into()).spawn(move || {
        let written = File::options().write(true).open(&state).and_then(|file| {
            // A single call, which is not made again when it is interrupted.
            Ok(nix::unistd::write(&file, b"offline").map(drop)?)
        });
        let _ = tell.send(written);
    })?;
    let lost = |_| Err(io::Error::other("the thread ended"));
    let result = match timeout_at(give_up, &mut told).await {
        Ok(result) => result.unwrap_or_else(lost),
        Err(_) => {
            // It is not joined yet, so this names it and no other.
            pthread_kill(thread.as_pthread_t(), Signal::SIGUSR1)?;
            told.await.unwrap_or_else(lost)
        }
    };
    let _ = thread.join();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(numbers("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(numbers("0\n"), [0]);
        assert!(numbers("\n").is_empty());
    }

    /// A sysfs of so many processors, the first `online` of which run.
    fn cpus(present: u32, online: u32) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for cpu in 0..present {
            fs::create_dir(dir.path().join(format!("cpu{cpu}"))).unwrap();
            if cpu > 0 {
                fs::write(dir.path().join(format!("cpu{cpu}/online")), "").unwrap();
            }
        }
        fs::write(dir.path().join("present"), format!("0-{}\n", present - 1)).unwrap();
        fs::write(dir.path().join("online"), format!("0-{}\n", online - 1)).unwrap();
        dir
    }

    fn written(dir: &Path, cpu: u32) -> String {
        fs::read_to_string(dir.join(format!("cpu{cpu}/online"))).unwrap()
    }

    #[test]
    fn the_lowest_come_and_the_highest_go() {
        let dir = cpus(4, 1);
        assert_eq!(processors(dir.path(), 3).unwrap(), 3);
        assert_eq!([1, 2, 3].map(|cpu| written(dir.path(), cpu)), ["1", "1", ""]);
        let dir = cpus(4, 4);
        assert_eq!(processors(dir.path(), 2).unwrap(), 2);
        assert_eq!([1, 2, 3].map(|cpu| written(dir.path(), cpu)), ["", "0", "0"]);
        assert_eq!(processors(dir.path(), 0).unwrap(), 4, "as they are");
    }

    #[test]
    fn more_than_there_are_is_refused_and_a_failure_takes_the_rest_back() {
        let dir = cpus(2, 1);
        let error = processors(dir.path(), 3).unwrap_err().to_string();
        assert_eq!(error, "the machine has 2");
        let dir = cpus(3, 1);
        fs::remove_dir_all(dir.path().join("cpu2")).unwrap();
        assert!(processors(dir.path(), 3).is_err());
        assert_eq!(written(dir.path(), 1), "0");
    }

    #[tokio::test]
    async fn blocks_that_stay_in_use_are_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("block_size_bytes"), "8000000\n").unwrap();
        for n in [9, 11] {
            fs::create_dir(dir.path().join(format!("memory{n}"))).unwrap();
            fs::write(dir.path().join(format!("memory{n}/state")), "online\n").unwrap();
        }
        let at = |n: u64| n << 27;
        // Block 10 cannot be removed, since it is not there.
        let removed = remove(dir.path(), &[at(11), at(10), at(9)], 2).await.unwrap();
        assert_eq!(removed, [at(11), at(9)]);
        let request = ResizeRequest { block_bytes: 1 << 27, add: vec![at(11)], ..Default::default() };
        check_blocks(dir.path(), &request).unwrap();
        add(dir.path(), &request).await.unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("memory11/state")).unwrap(), "online");
        let odd = ResizeRequest { block_bytes: 1 << 27, add: vec![at(11) + 4096], ..Default::default() };
        assert!(check_blocks(dir.path(), &odd).is_err());
    }
}
