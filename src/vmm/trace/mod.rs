// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Traces of events, in Chrome's and Perfetto's JSON format.
//!
//! A [`Trace`] is an array of events in the Trace Event Format. It is written in pieces of whole
//! events, so that it can be loaded even if the process was killed: then the array has no end, and
//! the last 64 KiB may be missing. It continues when a machine restarts: each life is a process of
//! the trace.
//!
//! Sources of events have an `Option` of it: without a trace the arguments of an event are not
//! built.
//!
//! | category | events |
//! |---|---|
//! | `exit` | accesses of vCPUs that leave KVM, by port or guest-physical address, and their duration |
//! | `register` | accesses to the registers of a virtual IOMMU, by name, with their value |
//! | `descriptor` | descriptors of the invalidation queue, with their fields |
//! | `policy` | changes of how a requester's DMA is translated |
//! | `host` | host calls, with the objects they name, a new one first, and their duration |
//! | `emulated host` | the same of an emulated host beside the kernel's |
//! | `fault`, `interrupt fault` | what was refused, why, and whether it is reported to the guest |
//! | `interrupt` | messages as sent by a function or the IOAPIC, `MSI` as received by the LAPICs, triggered routes |
//! | `device` | notified queues, returned buffers, DMA of `edu` |

mod observers;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use twostage::sync::Mutex;

use serde_json::{json, Value};

pub(super) use crate::arch::decoded_message as decoded;
use crate::console::deadline::Patient;
use crate::{process::named_file, Error, Result};
pub(super) use observers::{EmulatedCalls, IommuObserver, TracedDma, TracedInterrupts};

/// An open trace. Any thread may add to it.
pub struct Trace {
    path: PathBuf,
    origin: Instant,
    /// The machine's current life, from 1.
    life: AtomicU32,
    out: Mutex<Output>,
}

struct Output {
    /// `None` after an error.
    writer: Option<Box<dyn Write + Send>>,
    /// Whole events that are not written yet.
    waiting: Vec<u8>,
    empty: bool,
    complete: bool,
}

/// Size of the pieces that are written, in bytes; exceeded by at most one event.
const PIECE: usize = 64 << 10;

impl Output {
    /// Writes what is buffered. An error ends the trace.
    fn flush(&mut self) -> io::Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let result = writer.write_all(&self.waiting);
        self.waiting.clear();
        if result.is_err() {
            self.writer = None;
            self.complete = false;
        }
        result
    }
}

impl Trace {
    /// A trace in the file at `path`, which is created or truncated.
    ///
    /// # Errors
    /// The file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let what = || format!("--trace {}", path.display());
        let failed = |source| Error::Output { what: what(), source };
        let mut options = File::options();
        options.write(true).create(true).truncate(true);
        let file = named_file::open(path, &options, 0).map_err(failed)?;
        Ok(Self::new(path, Box::new(Patient::new(file))))
    }

    fn new(path: &Path, writer: Box<dyn Write + Send>) -> Self {
        let out = Mutex::new(Output {
            writer: Some(writer),
            waiting: b"[".to_vec(),
            empty: true,
            complete: true,
        });
        let (path, life) = (path.to_owned(), AtomicU32::new(1));
        Self { path, origin: Instant::now(), life, out }
    }

    /// Later events belong to the machine's next life.
    pub fn next_life(&self) {
        self.life.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends the array; later events are lost. Returns whether everything was written; otherwise a
    /// warning is logged.
    pub fn finish(&self) -> bool {
        let mut out = self.out.lock();
        out.waiting.extend_from_slice(b"\n]\n");
        if let Err(error) = out.flush() {
            log::warn!("{}: {error}; the trace is not complete", self.path.display());
        }
        out.writer = None;
        out.complete
    }

    /// Something that just happened.
    pub fn instant(&self, category: &'static str, name: &str, args: Value) {
        let ts = micros(self.origin.elapsed());
        self.event(json!({
            "ph": "i", "s": "t", "cat": category, "name": name, "ts": ts, "args": args,
        }));
    }

    /// Something that started at `started` and took `duration`.
    pub fn complete(
        &self,
        category: &'static str,
        name: &str,
        started: Instant,
        duration: Duration,
        args: Value,
    ) {
        let ts = micros(started.saturating_duration_since(self.origin));
        let dur = micros(duration);
        self.event(json!({
            "ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "args": args,
        }));
    }

    /// Writes `event` on behalf of the calling thread.
    fn event(&self, mut event: Value) {
        let (thread, new) = thread_number();
        let life = self.life.load(Ordering::Relaxed);
        event["pid"] = life.into();
        event["tid"] = thread.into();
        if new {
            if let Some(name) = std::thread::current().name() {
                self.write(&json!({
                    "ph": "M", "name": "thread_name", "pid": life, "tid": thread,
                    "args": { "name": name },
                }));
            }
        }
        self.write(&event);
    }

    fn write(&self, event: &Value) {
        let mut out = self.out.lock();
        if out.writer.is_none() {
            return;
        }
        let separator = if out.empty { "\n" } else { ",\n" };
        out.empty = false;
        out.waiting.extend_from_slice(format!("{separator}{event}").as_bytes());
        if out.waiting.len() >= PIECE {
            if let Err(error) = out.flush() {
                log::warn!("{}: {error}; the trace ends here", self.path.display());
            }
        }
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        self.finish();
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Trace").field(&self.path).finish()
    }
}

/// The format uses microseconds; fractions are allowed.
fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// A small number for the calling thread, and whether it is new.
fn thread_number() -> (u32, bool) {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    thread_local!(static NUMBER: Cell<u32> = const { Cell::new(0) });
    NUMBER.with(|number| {
        let new = number.get() == 0;
        if new {
            number.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        (number.get(), new)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_that_ends_is_valid_json() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = Trace::create(file.path()).unwrap();
        trace.instant("test", "first \"quoted\"", json!({ "value": 7 }));
        let worker = std::thread::Builder::new().name("worker".into());
        std::thread::scope(|scope| {
            worker
                .spawn_scoped(scope, || {
                    let started = Instant::now();
                    trace.complete("test", "second", started, Duration::from_micros(5), json!({}));
                })
                .unwrap();
        });
        drop(trace);
        let text = std::fs::read_to_string(file.path()).unwrap();
        let events: Vec<Value> = serde_json::from_str(&text).unwrap();
        let named = |name: &str| events.iter().find(|event| event["name"] == name).unwrap();
        assert_eq!(named("first \"quoted\"")["args"]["value"], 7);
        assert_eq!(named("second")["dur"], 5.0);
        assert_eq!(named("second")["ph"], "X");
        let thread = events.iter().find(|event| event["args"]["name"] == "worker").unwrap();
        assert_eq!(thread["tid"], named("second")["tid"]);
        assert_ne!(thread["tid"], named("first \"quoted\"")["tid"]);
    }

    #[test]
    fn lives_are_told_apart() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = Trace::create(file.path()).unwrap();
        trace.instant("test", "first", json!({}));
        trace.next_life();
        trace.instant("test", "second", json!({}));
        drop(trace);
        let text = std::fs::read_to_string(file.path()).unwrap();
        let events: Vec<Value> = serde_json::from_str(&text).unwrap();
        let lives: Vec<_> =
            events.iter().filter(|event| event["ph"] == "i").map(|event| &event["pid"]).collect();
        assert_eq!(lives, [1, 2]);
    }

    #[test]
    fn an_empty_trace_is_valid_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        drop(Trace::create(file.path()).unwrap());
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Value>>(&text).unwrap().len(), 0);
    }

    #[test]
    fn a_file_that_cannot_be_is_named() {
        let error = Trace::create(Path::new("/nonexistent/trace.json")).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/trace.json"), "{error}");
    }

    #[test]
    fn a_full_disk_ends_the_trace_and_nothing_else() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let trace = Trace::new(Path::new("full"), Box::new(Full));
        trace.instant("test", &"lost".repeat(PIECE), Value::Null);
        trace.instant("test", "lost too", Value::Null);
        assert!(trace.out.lock().writer.is_none());
    }
}
