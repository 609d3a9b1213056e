//! Programs beside the VMM: started, recorded, and named in errors.
//! Knows no particular program.

use std::time::Duration;

use crate::{
    Journal, LaunchError,
    child::{Child, ChildSpec},
};

/// How long a program may take until its sockets are there. It takes milliseconds; a host that swaps
/// or starts a hundred machines at once takes longer.
pub(crate) const HELPER_DEADLINE: Duration = Duration::from_secs(20);

/// Starts a program.
pub(crate) fn spawn(spec: ChildSpec) -> Result<Child, LaunchError> {
    let (name, path) = (spec.name.clone(), spec.program.clone());
    Child::spawn(spec).map_err(|source| LaunchError::Program { name, path, source })
}

/// Tells the journal of a program.
pub(crate) fn record(child: &Child, journal: &dyn Journal) -> Result<(), LaunchError> {
    journal
        .process(child.name(), child.pid(), child.start_time_ticks())
        .map_err(|source| LaunchError::Journal { name: child.name().into(), pid: child.pid(), source })
}

/// It ended before it did what was awaited.
pub(crate) fn ended(child: &Child, exit: crate::Exit, awaited: &str) -> LaunchError {
    LaunchError::Ended {
        name: child.name().into(),
        path: child.program().into(),
        exit,
        awaited: awaited.into(),
        messages: child.last_errors(),
    }
}

/// It did not do in time what was awaited.
pub(crate) fn late(child: &Child, awaited: &str) -> LaunchError {
    LaunchError::Late {
        name: child.name().into(),
        path: child.program().into(),
        awaited: awaited.into(),
        waited: HELPER_DEADLINE,
        messages: child.last_errors(),
    }
}
