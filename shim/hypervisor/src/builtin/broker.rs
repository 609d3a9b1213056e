//! Serves the events of a VMM, which is jailed and opens nothing: connects in its place.
//! Knows paths of the vsock device's sockets; the streams are somebody else's.

use std::{
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use bulkhead_vmm_spec::wire::{Command, Ended, Event, Message, Request, Slot};
use tokio::net::UnixStream;

use super::channel::Channel;

/// Serves events until the VMM is gone.
pub(super) async fn attend(channel: Channel, vsock: PathBuf) {
    let mut id = 0;
    loop {
        let event = match channel.receive().await {
            Ok(Some(Message::Event(event))) => event,
            Ok(Some(Message::Reply { result: Err(error), .. })) => {
                tracing::warn!("the machine refused: {error}");
                continue;
            }
            Ok(Some(Message::Reply { .. })) => continue,
            Ok(None) => return,
            Err(error) => return tracing::warn!(%error, "the control socket of a machine"),
        };
        match event {
            Event::Dial { dial, port } => {
                id += 1;
                if let Err(error) = answer(&channel, &vsock, id, dial, port).await {
                    return tracing::debug!(%error, "the machine does not take its stream");
                }
            }
            // What they say arrives by the console and by the VMM's last words too, which are kept.
            Event::Panic { message } => tracing::debug!("guest kernel: {message}"),
            Event::Ended(Ended::Guest) => tracing::debug!("the guest has ended its machine"),
            Event::Ended(Ended::Failure(text)) => tracing::debug!("the machine failed: {text}"),
        }
    }
}

/// Connects to a port of the host. Where nobody listens, the answer has no stream: the guest is refused.
async fn answer(channel: &Channel, vsock: &Path, id: u64, dial: u64, port: u32) -> std::io::Result<()> {
    let mut path = vsock.as_os_str().to_owned();
    path.push(format!("_{port}"));
    let stream = UnixStream::connect(&path).await.and_then(UnixStream::into_std).ok();
    let slot = stream.as_ref().map(|_| Slot(0));
    let request = Request { id, command: Command::Dialed { dial, stream: slot } };
    let fds: Vec<_> = stream.iter().map(AsFd::as_fd).collect();
    channel.send(&request, &fds).await
}
