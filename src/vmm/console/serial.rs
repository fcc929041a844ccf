// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port: a 16550 and its backend.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, MutexGuard};
use twostage::sync::Mutex;

use vm_superio::serial::SerialEvents;
use vm_superio::Serial;
use vmm_sys_util::eventfd::{EventFd, EFD_NONBLOCK};

use crate::arch::layout::SERIAL_IRQ;
use crate::arch::EdgeLine;
use crate::bus::BusDevice;
use crate::config::SerialConfig;
use crate::console::deadline::{self, Turn};
use crate::console::output::Output;
use crate::interrupts::Interrupts;
use crate::process::named_file;
use crate::{Error, Result};

/// Number of its registers, of one byte each.
pub(crate) const REGISTERS: u64 = 8;
/// The modem control register, with the loopback bit.
const MODEM_CONTROL: u64 = 4;

/// Notifies the event loop when there may be room for input.
struct RoomForInput(EventFd);

impl RoomForInput {
    fn tell(&self) {
        if let Err(error) = self.0.write(1) {
            log::debug!("serial input: {error}");
        }
    }
}

impl SerialEvents for RoomForInput {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    // The output accepts everything and reports its own losses.
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.tell();
    }
}

type Uart = Serial<EdgeLine, RoomForInput, Box<dyn Write + Send>>;

/// The serial port of a machine.
pub(crate) struct SerialPort {
    uart: Mutex<Uart>,
    /// Written when there may be room for input.
    room: RoomForInput,
    /// The destination of the guest's output, if any.
    output: Option<Output>,
}

impl SerialPort {
    /// A port with the backend of `config`, and its interrupt.
    pub fn new(config: &SerialConfig, interrupts: &Interrupts) -> Result<Arc<Self>> {
        let output = match config {
            SerialConfig::Tty => Some(Output::standard()?),
            SerialConfig::Null => None,
            SerialConfig::File(path) => {
                Some(to_file(path, File::options().create(true).truncate(true))?)
            }
            SerialConfig::Append(path) => {
                Some(to_file(path, File::options().create(true).append(true))?)
            }
        };
        let irq = interrupts.edge_line(SERIAL_IRQ)?;
        let room = RoomForInput(EventFd::new(EFD_NONBLOCK).map_err(Error::os("eventfd"))?);
        let told = RoomForInput(room.0.try_clone().map_err(Error::os("eventfd"))?);
        let out: Box<dyn Write + Send> = match &output {
            Some(output) => Box::new(output.clone()),
            None => Box::new(io::sink()),
        };
        let uart = Mutex::new(Serial::with_events(irq, told, out));
        Ok(Arc::new(Self { uart, room, output }))
    }

    /// Readable when there may be room for input.
    pub fn room(&self) -> &EventFd {
        &self.room.0
    }

    /// Passes as many of `bytes` to the guest as there is room for; returns their number.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let room = uart.fifo_capacity();
        let taken = bytes.get(..room).unwrap_or(bytes);
        if let Err(error) = uart.enqueue_raw_bytes(taken) {
            log::debug!("serial input: {error}");
        }
        // None while the guest uses loopback.
        room.saturating_sub(uart.fifo_capacity())
    }

    /// Prints something to the reader of the guest's output.
    pub fn say(&self, text: &str) {
        if let Some(output) = &self.output {
            output.take(text.as_bytes());
        }
    }

    /// Waits until the guest's output is written, for a limited time.
    pub fn flush(&self) {
        if let Some(output) = &self.output {
            // Losses are reported by the output.
            let until = deadline::of(Turn::Output).unwrap_or_else(deadline::soon);
            let _ = output.flush(until);
        }
    }

    /// Bytes of the guest's output that nobody got, of all machines that had this output.
    pub fn lost(&self) -> u64 {
        self.output.as_ref().map_or(0, Output::lost)
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock()
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            // The device's range is its eight registers.
            *byte = self.lock().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            if let Err(error) = self.lock().write(offset as u8, *byte) {
                log::debug!("serial port: {error}");
            }
            if offset == MODEM_CONTROL {
                self.room.tell();
            }
        }
    }
}

/// Output to the file at `path`.
fn to_file(path: &Path, options: &mut OpenOptions) -> Result<Output> {
    let file = named_file::open(path, options.write(true), 0);
    let what = || format!("--serial file={}", path.display());
    let file = file.map_err(|source| Error::Output { what: what(), source })?;
    Output::new(path.display().to_string(), file)
}
