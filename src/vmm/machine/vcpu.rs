// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that each vCPU runs in.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::Killable;

use crate::arch::exits::{ExitKind, Exits};
use crate::arch::Processor;
use crate::memory::MachineMemory;
use crate::process::signals::kick_signal;
use crate::process::stop::{StopReason, Stopper};
use crate::{Error, Result};

/// Runs `processor` in a thread of its own until the machine stops.
///
/// # Errors
/// The thread cannot be started.
pub(crate) fn spawn(
    processor: Processor,
    exits: Arc<Exits>,
    memory: MachineMemory,
    stopper: Stopper,
) -> Result<VcpuThread> {
    let handle = thread::Builder::new()
        .name(format!("vcpu{}", processor.id()))
        .spawn(move || {
            let _guard = PanicGuard(&stopper);
            run(processor, &exits, &memory, &stopper);
        })
        .map_err(Error::os("vCPU thread"))?;
    Ok(VcpuThread(Some(handle)))
}

fn run(mut processor: Processor, exits: &Exits, memory: &MachineMemory, stopper: &Stopper) {
    while stopper.reason().is_none() {
        match processor.enter(exits, memory) {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(reason)) => {
                stopper.stop(reason);
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                exits.counters.count(ExitKind::Interrupted);
            }
            Err(error) => {
                let stuck = format!("vCPU {}: KVM_RUN: {error}", processor.id());
                stopper.stop(StopReason::Stuck(stuck));
            }
        }
    }
}

/// Stops the machine when the thread that holds it panics.
struct PanicGuard<'a>(&'a Stopper);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.stop(StopReason::Software("a vCPU thread panicked".to_owned()));
        }
    }
}

/// A running vCPU. Dropping it waits for the thread; the machine must have been stopped before.
#[derive(Debug)]
pub(crate) struct VcpuThread(Option<JoinHandle<()>>);

impl Drop for VcpuThread {
    fn drop(&mut self) {
        let Some(handle) = self.0.take() else { return };
        // A signal that comes just before the thread enters KVM is lost, so it is sent until the
        // thread is gone.
        while !handle.is_finished() {
            if let Err(error) = handle.kill(kick_signal()) {
                log::debug!("kicking a vCPU: {error}");
            }
            thread::sleep(Duration::from_millis(1));
        }
        if handle.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}
