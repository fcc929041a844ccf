// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the C library does once in a process.

use std::hint::black_box;
use std::io;
use std::sync::mpsc;
use std::thread;

use crate::sync::Mutex;

/// Has the C library do now what it does only once in a process, on whichever thread needs it
/// first. glibc opens, reads and closes files in `/proc` and `/sys`: before a thread other than the
/// main one returns memory to the kernel, for how that overcommits memory; and before a ninth
/// thread besides the main one has memory of its own, for how many processors there are. A VMM
/// calls this before it installs its first filter.
///
/// # Errors
/// A thread cannot be started.
pub fn prepare() -> io::Result<()> {
    let end = Mutex::new(());
    thread::scope(|scope| {
        let not_yet = end.lock();
        let (has_memory, all_have) = mpsc::channel::<()>();
        for _ in 0..THREADS_WITH_MEMORY {
            let (end, has_memory) = (&end, has_memory.clone());
            let work = move || {
                let memory = [(); 4].map(|()| black_box(vec![1u8; 100_000]));
                drop(has_memory);
                drop(end.lock());
                // The last one is at the end of the thread's heap, and more than glibc keeps there.
                drop(memory);
            };
            thread::Builder::new().name("prepare".to_owned()).spawn_scoped(scope, work)?;
        }
        drop(has_memory);
        // Nothing is sent: it ends when all have dropped theirs.
        let _ = all_have.recv();
        drop(not_yet);
        Ok(())
    })
}

/// That many threads besides the main one have glibc ask for the number of processors
/// (`M_ARENA_TEST`, mallopt(3), and one more).
const THREADS_WITH_MEMORY: usize = 9;
