// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Calls on emulated files, from this process and, as their owner, from others.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use twostage::iommufd::Errno;

use crate::callers::caller::CallingProcess;
use crate::callers::remote::{self, Request};
use crate::files::file::{Answer, Call};
use crate::memory::accounts::Pinned;
use crate::state::{self, Kind, Own, Slot, State};
use crate::{sys, table};

/// Answers a call on `fd`; `None` if it is not an emulated file. `EBADF` if it is being closed.
pub fn call(state: &State, fd: RawFd, call: Call) -> Option<Result<i64, Errno>> {
    let slot = match state.find(fd).transpose()? {
        Ok(slot) => slot,
        Err(errno) => return Some(Err(errno)),
    };
    let result = match slot.kind {
        Kind::Own(own) => {
            let caller = CallingProcess::own();
            let mut result = make(state, &own, &caller, call);
            if result.is_err_and(|errno| errno == Errno::EBUSY) {
                // Perhaps busy only because of a process that is gone.
                state.end_hung_up();
                result = make(state, &own, &caller, call);
            }
            if !state.waiting.is_empty() {
                let _serving = state.serving();
                state.waiting.resume();
            }
            result
        }
        Kind::Foreign => remote::call(fd, call),
    };
    state.pins.sweep();
    if result.is_ok_and(|answer| answer.take_message) {
        // Fails if another thread was faster, through a duplicate of the descriptor.
        let _ = sys::receive(fd, &mut [0], false);
    }
    Some(result.map(|answer| answer.value))
}

/// Makes `call` on a file of this process. Its effects on others are left to the caller: DMA that
/// waits for a page must continue ([`Waiting::resume`](crate::files::waiting::Waiting::resume),
/// while serving) before the writer of the response, or whoever ended the attachment, gets the
/// result.
fn make(state: &State, own: &Own, caller: &CallingProcess, call: Call) -> Result<Answer, Errno> {
    let result = own.file.call(caller, call);
    if matches!(call, Call::Write { .. }) {
        state.waiting.written(&own.file);
    }
    result
}

/// What iommufds accessible to this process have pinned of process `pid`.
pub fn pinned(state: &State, pid: i32) -> Pinned {
    let mut all = pinned_here(state, pid);
    let mut asked = BTreeSet::new();
    for (fd, _) in table::ours(0, u32::MAX) {
        // Each owner once.
        let foreign = matches!(state.find(fd), Ok(Some(Slot { kind: Kind::Foreign, .. })));
        if let Some(owner) = sys::peer_process(fd).ok().filter(|_| foreign) {
            let pinned = if asked.insert(owner) { remote::pinned(fd, pid).ok() } else { None };
            let pinned = pinned.unwrap_or_default();
            all.pinned += pinned.pinned;
            all.locked += pinned.locked;
        }
    }
    all
}

/// What the iommufds of this process have pinned of the process that currently has the ID `pid`.
fn pinned_here(state: &State, pid: i32) -> Pinned {
    let process = state.processes.of(pid);
    process.map_or(Pinned::default(), |process| state.accounts.pinned_of(&process))
}

/// Takes one call of another process on the file whose descriptors have `inode`, or ends the file
/// when its last descriptor is closed.
pub fn serve(inode: u64) {
    let state = state::current();
    match answer_one(state, inode) {
        Ok(true) => {}
        // No more requests.
        Ok(false) => state.hung_up(inode),
        Err(errno) => log::warn!("a call from another process: {errno}"),
    }
}

/// Takes one call on the file with `inode`, and answers it; returns whether there was one.
///
/// # Errors
/// The message is invalid, or the caller is gone.
fn answer_one(state: &State, inode: u64) -> Result<bool, Errno> {
    let _serving = state.serving();
    let Some(own) = state.own(inode) else { return Ok(false) };
    let Some((request, channel)) = remote::take_request(own.end.raw())? else { return Ok(false) };
    let channel = Arc::new(channel);
    match request {
        Request::Call(call) => {
            let process = state.processes.behind(channel.as_raw_fd())?;
            let caller = CallingProcess::remote(process, channel.clone());
            let result = make(state, &own, &caller, call);
            state.waiting.resume();
            remote::answer_call(&channel, result)?;
        }
        Request::Pinned(pid) => {
            remote::answer_pinned(&channel, pinned_here(state, pid))?;
        }
    }
    Ok(true)
}
