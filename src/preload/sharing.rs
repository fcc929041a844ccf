// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which threads share the descriptors described by the table: all, except those that unshared them
//! (`CLOSE_RANGE_UNSHARE`).

use std::cell::Cell;

thread_local! {
    static APART: Cell<bool> = const { Cell::new(false) };
}

/// This thread has unshared its descriptors.
pub fn leave() {
    APART.set(true);
}

/// Whether this thread has unshared its descriptors.
pub fn is_apart() -> bool {
    APART.get()
}

/// Whether the process has at most this thread and `ours` others. False if `/proc` is not
/// available.
pub fn is_alone(ours: usize) -> bool {
    let Ok(tasks) = std::fs::read_dir("/proc/self/task") else { return false };
    let live = |task: std::io::Result<std::fs::DirEntry>| match task {
        Ok(task) => {
            std::fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| is_live(&stat))
        }
        Err(_) => true,
    };
    tasks.map(live).filter(|live| *live).count() <= 1 + ours
}

/// Whether a thread with this `stat` in `/proc` is not exiting: a joined thread may still be listed
/// there.
fn is_live(stat: &str) -> bool {
    const PF_EXITING: u64 = 4;
    // The name may contain anything.
    let flags = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(6)?.parse().ok());
    flags.is_none_or(|flags: u64| flags & PF_EXITING == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_end() {
        let stat = |flags| format!("7 (a) (b) R 1 7 7 0 -1 {flags} 93 0 0");
        assert!(is_live(&stat("4194304")));
        assert!(!is_live(&stat("4194308")));
        assert!(is_live("what no kernel writes"));
    }

    #[test]
    fn threads_are_seen() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        assert!(!is_alone(0));
        assert!(is_alone(1 << 20));
        drop(end);
        assert!(other.join().is_ok());
    }
}
