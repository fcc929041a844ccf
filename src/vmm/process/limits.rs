// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What to do about an error that comes of a limit of the process.

use std::sync::OnceLock;

use libc::{EAGAIN, EMFILE, ENFILE, ENOMEM};
use rustix::process::{getrlimit, Resource};

/// How many files the process may have open, if that is limited.
static FILES: OnceLock<Option<u64>> = OnceLock::new();

/// Called at the process's start: in its jail it cannot ask.
pub(crate) fn look() {
    FILES.get_or_init(|| getrlimit(Resource::Nofile).current);
}

/// What to do about the error that `text` tells of, to be appended to it; nothing if it does not
/// come of a limit. It takes text, as errors of other crates often are no more.
pub(crate) fn advice(text: &str) -> String {
    let is = |error: i32| text.contains(&format!("(os error {error})"));
    let files =
        FILES.get().copied().flatten().map_or("no more".to_owned(), |most| most.to_string());
    if is(EMFILE) {
        format!("; this process may have {files} files open: raise it with ulimit -n")
    } else if is(ENFILE) {
        "; this system has as many files open as it may: raise fs.file-max with sysctl".to_owned()
    } else if is(EAGAIN) && text.contains("thread") {
        "; no more threads: see ulimit -u and -v, and pids.max of the control group".to_owned()
    } else if is(ENOMEM) {
        "; see ulimit -v and -l, and the host's free memory".to_owned()
    } else {
        String::new()
    }
}

/// `text` with what to do about the error that it tells of ([`advice`]).
pub(crate) fn with_advice(text: &str) -> String {
    format!("{text}{}", advice(text))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn advice_is_for_errors_of_limits_alone() {
        let of =
            |what: &str, error| advice(&format!("{what}: {}", io::Error::from_raw_os_error(error)));
        look();
        let files = getrlimit(Resource::Nofile).current.unwrap();
        let text = format!("; this process may have {files} files open: raise it with ulimit -n");
        assert_eq!(of("--disk", EMFILE), text);
        assert!(of("--disk", ENFILE).contains("fs.file-max"));
        assert!(of("vCPU thread", EAGAIN).contains("ulimit -u"));
        assert!(of("--memory", ENOMEM).contains("ulimit -v"));
        assert_eq!([of("a read", EAGAIN), of("a thread", libc::EIO)], ["", ""]);
    }
}
