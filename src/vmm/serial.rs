// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port: a 16550 at 0x3f8, and where its bytes go and come from.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};
use vmm_sys_util::terminal::Terminal;

use super::bus::BusDevice;
use super::config::SerialConfig;
use super::interrupts::Interrupts;
use super::{Error, Result};

/// First of the eight I/O ports.
pub(super) const FIRST_PORT: u64 = 0x3f8;
/// Last of the eight I/O ports.
pub(super) const LAST_PORT: u64 = 0x3ff;
/// ISA interrupt of the first serial port.
const IRQ: u32 = 4;

/// Raises the port's interrupt.
struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

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

type Uart = Serial<Irq, InputTaken, Box<dyn Write + Send>>;

/// The serial port of a machine.
pub(super) struct SerialPort {
    uart: Mutex<Uart>,
    input_taken: EventFd,
}

impl SerialPort {
    /// A port that leads where `config` says, its interrupt wired.
    pub fn new(config: &SerialConfig, interrupts: &Interrupts) -> Result<Arc<Self>> {
        let out: Box<dyn Write + Send> = match config {
            SerialConfig::Tty => Box::new(io::stdout()),
            SerialConfig::Null => Box::new(io::sink()),
            SerialConfig::File(path) => Box::new(
                File::create(path)
                    .map_err(|source| Error::Output { path: path.clone(), source })?,
            ),
        };
        let irq = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        interrupts.wire_edge(&irq, IRQ)?;
        let input_taken = EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?;
        let taken = InputTaken(input_taken.try_clone().map_err(Error::os("eventfd"))?);
        let uart = Mutex::new(Serial::with_events(Irq(irq), taken, out));
        Ok(Arc::new(Self { uart, input_taken }))
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            // The range of the device is eight ports.
            *byte = self.uart.lock().unwrap_or_else(PoisonError::into_inner).read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = uart.write(offset as u8, *byte) {
                log::debug!("serial port: {error}");
            }
        }
    }
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
        let mut uart = self.port.uart.lock().unwrap_or_else(PoisonError::into_inner);
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
    /// The guest has to read first.
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
