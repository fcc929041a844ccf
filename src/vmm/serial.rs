// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port: a 16550, and where its bytes go and come from.
#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_superio::serial::SerialEvents;
use vm_superio::Serial;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::terminal::Terminal;

use super::arch::layout::SERIAL_IRQ;
use super::arch::EdgeLine;
use super::bus::BusDevice;
use super::config::SerialConfig;
use super::interrupts::Interrupts;
use super::named_file;
use super::stop::Stopper;
use super::{Error, Result};

/// How many registers it has, of a byte each.
pub(super) const REGISTERS: u64 = 8;

/// Tells the event loop when the guest has read all that was typed.
struct InputTaken(EventFd);

impl SerialEvents for InputTaken {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {
        log::debug!("a byte of the serial port could not be written");
    }

    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            log::debug!("serial input: {error}");
        }
    }
}

type Uart = Serial<EdgeLine, InputTaken, Box<dyn Write + Send>>;

/// Standard output, as long as the machine runs. Nobody may be reading it, and a vCPU that waits in
/// a write must not keep a stopped machine alive.
struct StandardOutput {
    file: File,
    stopper: Stopper,
}

impl Write for StandardOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A vCPU is kicked with a signal, so a write that waits is interrupted, and asked for anew.
        if self.stopper.reason().is_some() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The serial port of a machine.
pub(super) struct SerialPort {
    uart: Mutex<Uart>,
    /// Written when there may be room for input again.
    input_taken: EventFd,
    /// The event loop found the port busy, and wants to hear when it is not.
    input_waits: AtomicBool,
}

impl SerialPort {
    /// A port that leads where `config` says, its interrupt wired.
    pub fn new(
        config: &SerialConfig,
        interrupts: &Interrupts,
        stopper: Stopper,
    ) -> Result<Arc<Self>> {
        let out: Box<dyn Write + Send> = match config {
            SerialConfig::Tty => {
                let fd = io::stdout().as_fd().try_clone_to_owned();
                let file = File::from(fd.map_err(Error::os("standard output"))?);
                Box::new(StandardOutput { file, stopper })
            }
            SerialConfig::Null => Box::new(io::sink()),
            SerialConfig::File(path) => open(path, File::options().create(true).truncate(true))?,
            SerialConfig::Append(path) => open(path, File::options().create(true).append(true))?,
        };
        let irq = interrupts.edge_line(SERIAL_IRQ)?;
        let input_taken = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        let taken = InputTaken(input_taken.try_clone().map_err(Error::os("eventfd"))?);
        let uart = Mutex::new(Serial::with_events(irq, taken, out));
        Ok(Arc::new(Self { uart, input_taken, input_waits: AtomicBool::new(false) }))
    }

    /// Lets the guest access the port.
    fn access<T>(&self, access: impl FnOnce(&mut Uart) -> T) -> T {
        let result = access(&mut self.uart.lock().unwrap_or_else(PoisonError::into_inner));
        // The port is free again by now: whoever finds it busy after this has set the flag anew.
        if self.input_waits.swap(false, Ordering::SeqCst) {
            if let Err(error) = self.input_taken.write(1) {
                log::debug!("serial input: {error}");
            }
        }
        result
    }

    /// The port for the event loop, which must not wait for a guest's output; nothing while the
    /// guest accesses the port, and then `input_taken` will be written.
    fn try_lock(&self) -> Option<MutexGuard<'_, Uart>> {
        let attempt = || match self.uart.try_lock() {
            Ok(uart) => Some(uart),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        attempt().or_else(|| {
            self.input_waits.store(true, Ordering::SeqCst);
            // It may have become free before the flag was up.
            attempt()
        })
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            // The range of the device is eight registers.
            *byte = self.access(|uart| uart.read(offset as u8));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            if let Err(error) = self.access(|uart| uart.write(offset as u8, *byte)) {
                log::debug!("serial port: {error}");
            }
        }
    }
}

/// A file that the port's output goes to.
fn open(path: &Path, options: &mut OpenOptions) -> Result<Box<dyn Write + Send>> {
    let file = named_file::open(path, options.write(true), 0);
    Ok(Box::new(file.map_err(|source| Error::Output { path: path.to_owned(), source })?))
}

/// Standard input as the port's input: raw while it lives, as it was before afterwards.
pub(super) struct Console {
    port: Arc<SerialPort>,
    raw: bool,
}

impl Console {
    /// Connects standard input to `port`. A terminal becomes raw.
    pub fn new(port: Arc<SerialPort>) -> Result<Self> {
        let raw = io::stdin().is_terminal();
        if raw {
            io::stdin().lock().set_raw_mode().map_err(Error::os("terminal"))?;
        }
        Ok(Self { port, raw })
    }

    /// Takes what was typed, as much as the port has room for. Says what to wait for next.
    fn pump(&mut self) -> Input {
        let Some(mut uart) = self.port.try_lock() else { return Input::Full };
        let mut bytes = [0; 64];
        let room = uart.fifo_capacity().min(bytes.len());
        if room == 0 {
            return Input::Full;
        }
        match io::stdin().lock().read_raw(&mut bytes[..room]) {
            Ok(0) => Input::Ended,
            Ok(length) => {
                if let Err(error) = uart.enqueue_raw_bytes(&bytes[..length]) {
                    log::debug!("serial input: {error}");
                }
                Input::Open
            }
            Err(error) if error.errno() == libc::EAGAIN || error.errno() == libc::EINTR => {
                Input::Open
            }
            Err(error) => {
                log::debug!("standard input: {error}");
                Input::Ended
            }
        }
    }
}

/// What became of the input.
enum Input {
    /// There may be more.
    Open,
    /// The guest has to read first, or to finish its access.
    Full,
    /// There is no more.
    Ended,
}

impl MutEventSubscriber for Console {
    fn init(&mut self, ops: &mut EventOps) {
        // A regular file or /dev/null cannot be waited for: there is no input then.
        if let Err(error) = ops.add(Events::new(&io::stdin(), EventSet::IN)) {
            log::debug!("standard input: {error:?}");
        }
        if let Err(error) = ops.add(Events::new(&self.port.input_taken, EventSet::IN)) {
            log::error!("serial input: {error:?}");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let stdin = io::stdin();
        if events.fd() == self.port.input_taken.as_raw_fd() {
            // Only that it was written counts.
            let _ = self.port.input_taken.read();
            // Fails when input has ended, and there is nothing to wait for then.
            let _ = ops.modify(Events::new(&stdin, EventSet::IN));
            return;
        }
        let result = match self.pump() {
            Input::Open => Ok(()),
            Input::Full => ops.modify(Events::empty(&stdin)),
            Input::Ended => ops.remove(Events::empty(&stdin)),
        };
        if let Err(error) = result {
            log::error!("standard input: {error:?}");
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if self.raw {
            if let Err(error) = io::stdin().lock().set_canon_mode() {
                log::error!("the terminal is left raw: {error}");
            }
        }
    }
}
