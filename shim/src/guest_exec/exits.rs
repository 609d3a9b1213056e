//! Who waits for the end of which program in the guest.
//! Knows ids and statuses; the guest's events come from elsewhere.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::sync::oneshot;

/// Who waits, by the id of the program. None once the guest is gone, and with it whoever could tell.
type Waiting = Option<HashMap<String, oneshot::Sender<u8>>>;

/// The programs whose end is awaited.
#[derive(Clone)]
pub struct Exits(Arc<Mutex<Waiting>>);

impl Default for Exits {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Some(HashMap::new()))))
    }
}

impl Exits {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for the end of a program that is about to be started. It is an error when the guest goes before.
    pub fn expect(&self, exec: &str) -> oneshot::Receiver<u8> {
        let (tell, told) = oneshot::channel();
        if let Some(waiting) = self.waiting().as_mut() {
            waiting.insert(exec.to_owned(), tell);
        }
        told
    }

    /// Nobody waits for it any more.
    pub fn forget(&self, exec: &str) {
        if let Some(waiting) = self.waiting().as_mut() {
            waiting.remove(exec);
        }
    }

    /// The guest says that a program has ended. What nobody waits for changes nothing.
    pub fn told(&self, exec: &str, status: u8) {
        let waits = self.waiting().as_mut().and_then(|waiting| waiting.remove(exec));
        if let Some(tell) = waits {
            let _ = tell.send(status);
        }
    }

    /// The guest is gone.
    pub fn guest_gone(&self) {
        self.waiting().take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_is_told_once_to_who_waits_for_it() {
        let exits = Exits::default();
        let (one, two, three) = (exits.expect("1"), exits.expect("2"), exits.expect("3"));
        exits.told("2", 7);
        exits.told("2", 8);
        exits.told("x", 1);
        exits.forget("3");
        assert_eq!(two.await, Ok(7));
        assert!(three.await.is_err());
        exits.guest_gone();
        assert!(one.await.is_err(), "nobody is left to tell");
        assert!(exits.expect("4").await.is_err(), "nobody will tell");
    }
}
