//! Starts what runs beside everything else.
//! Knows the runtime; does not know what a task does.

use std::pin::Pin;

use tokio::task::JoinHandle;

/// Runs `work` beside everything else, on the one thread that there is.
///
/// In a box, so that what the runtime has for each kind of task is in the program once: it is several KiB, and the
/// shim must stay small.
pub fn spawn(work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    let boxed: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(work);
    tokio::spawn(boxed)
}
