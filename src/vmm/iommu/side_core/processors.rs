// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether this process has a processor for a side core, and whether that is its own.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use rustix::process::getpid;
use rustix::thread::{sched_getaffinity, sched_setaffinity, CpuSet};

/// The processors that this process may use at the same time.
pub(super) struct Processors {
    /// What its control groups have time for.
    limits: Vec<Limit>,
}

/// Files that stay open: a jailed thread opens none.
enum Limit {
    /// Quota and period.
    Both(File),
    /// Each in a file of its own: of older control groups.
    Each(File, File),
}

impl Processors {
    /// Those of the control groups that this process is in now.
    pub fn open() -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let path = |line: &str| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, path) = rest.split_once(':')?;
            let v2 = controllers.is_empty().then(|| format!("/sys/fs/cgroup{path}"));
            let v1 = controllers.split(',').any(|name| name == "cpu");
            v2.or_else(|| v1.then(|| format!("/sys/fs/cgroup/{controllers}{path}")))
        };
        Self { limits: groups.lines().filter_map(path).flat_map(|path| limits_of(&path)).collect() }
    }

    /// Those of its affinity (that of its first thread, as the side core may be bound to one of
    /// them), as far as its control groups have time for them.
    pub fn usable(&self) -> usize {
        let allowed = sched_getaffinity(Some(getpid())).map_or(1, |set| set.count() as usize);
        let quota = self.limits.iter().filter_map(Limit::whole).min();
        allowed.min(quota.unwrap_or(allowed))
    }
}

impl Limit {
    /// Whole processors; `None` without a limit.
    fn whole(&self) -> Option<usize> {
        match self {
            Self::Both(file) => whole(&read(file)?),
            Self::Each(quota, period) => {
                whole(&format!("{} {}", read(quota)?.trim(), read(period)?.trim()))
            }
        }
    }
}

/// The limits of the group at `path` and of those that it is in.
fn limits_of(path: &str) -> Vec<Limit> {
    let folders = std::path::Path::new(path).ancestors();
    let limit = |folder: &std::path::Path| {
        let open = |name: &str| File::open(folder.join(name)).ok();
        let both = open("cpu.max").map(Limit::Both);
        both.or_else(|| Some(Limit::Each(open("cpu.cfs_quota_us")?, open("cpu.cfs_period_us")?)))
    };
    folders.take_while(|folder| folder.starts_with("/sys/fs/cgroup")).filter_map(limit).collect()
}

/// The contents of a file of procfs or of a control group, or the start of it.
fn read(file: &File) -> Option<String> {
    let mut bytes = [0; 4096];
    let length = file.read_at(&mut bytes, 0).ok()?;
    std::str::from_utf8(bytes.get(..length)?).ok().map(str::to_owned)
}

/// The numbers of the processors of its affinity, as text, if `processor` is not one of them.
pub(super) fn check(processor: usize) -> Result<(), String> {
    let Ok(set) = sched_getaffinity(Some(getpid())) else { return Ok(()) };
    let has = |number: usize| number < CpuSet::MAX_CPU && set.is_set(number);
    if has(processor) {
        return Ok(());
    }
    let numbers: Vec<_> =
        (0..CpuSet::MAX_CPU).filter(|at| has(*at)).map(|at| at.to_string()).collect();
    Err(numbers.join(", "))
}

/// Binds the current thread to `processor`.
pub(super) fn bind(processor: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    if processor >= CpuSet::MAX_CPU {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    set.set(processor);
    Ok(sched_setaffinity(None, &set)?)
}

/// Whole processors of `text`, a quota and a period; `None` if it is no limit.
fn whole(text: &str) -> Option<usize> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period) = (quota.parse::<u64>().ok()?, period.parse::<u64>().ok()?);
    quota.checked_div(period).map(|whole| whole as usize)
}

/// How often the current thread had to give its processor to another one.
pub(super) struct Preemptions {
    status: Option<File>,
    last: u64,
}

impl Preemptions {
    /// Those of the current thread from now on.
    pub fn new() -> Self {
        let mut new = Self { status: File::open("/proc/thread-self/status").ok(), last: 0 };
        new.since();
        new
    }

    /// Those since the last call; 0 if they cannot be known.
    pub fn since(&mut self) -> u64 {
        let all = self.status.as_ref().and_then(preemptions).unwrap_or(self.last);
        let since = all.saturating_sub(self.last);
        self.last = all;
        since
    }
}

fn preemptions(status: &File) -> Option<u64> {
    let text = read(status)?;
    let line = text.lines().find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_a_number_of_whole_processors() {
        assert_eq!(whole("max 100000\n"), None);
        assert_eq!(whole("-1 100000"), None);
        assert_eq!(whole("150000 100000\n"), Some(1));
        assert_eq!(whole("400000 100000"), Some(4));
        assert_eq!(whole("50000 0"), None);
        assert_eq!(whole("50000"), None);
    }

    #[test]
    fn this_process_has_processors() {
        let processors = Processors::open();
        assert!(
            processors.usable() >= 1 || processors.limits.iter().any(|it| it.whole() == Some(0))
        );
        let first = (0..CpuSet::MAX_CPU).find(|at| check(*at).is_ok()).unwrap();
        assert!(check(usize::MAX).unwrap_err().contains(&first.to_string()));
        assert!(bind(usize::MAX).is_err());
        Preemptions::new().since();
    }
}
