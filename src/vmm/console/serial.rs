// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The serial port: a 16550, and where its bytes go.

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

/// How many registers it has, of a byte each.
pub(crate) const REGISTERS: u64 = 8;
/// The modem control register, which has the bit that leads output to input.
const MODEM_CONTROL: u64 = 4;

/// Tells the event loop when there may be room for input again.
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

    // Output takes everything, and says itself what it lost.
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.tell();
    }
}

type Uart = Serial<EdgeLine, RoomForInput, Box<dyn Write + Send>>;

/// The serial port of a machine.
pub(crate) struct SerialPort {
    uart: Mutex<Uart>,
    /// Written when there may be room for input again.
    room: RoomForInput,
    /// Where what the guest writes goes, unless nowhere.
    output: Option<Output>,
}

impl SerialPort {
    /// A port that leads where `config` says, its interrupt wired.
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

    /// What can be waited for until there may be room for input.
    pub fn room(&self) -> &EventFd {
        &self.room.0
    }

    /// Gives `bytes` to the guest, as many as there is room for now: so many.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        let mut uart = self.lock();
        let room = uart.fifo_capacity();
        let taken = bytes.get(..room).unwrap_or(bytes);
        if let Err(error) = uart.enqueue_raw_bytes(taken) {
            log::debug!("serial input: {error}");
        }
        // None of them where the guest has its own output as input.
        room.saturating_sub(uart.fifo_capacity())
    }

    /// Says something to whoever reads what the guest writes.
    pub fn say(&self, text: &str) {
        if let Some(output) = &self.output {
            output.take(text.as_bytes());
        }
    }

    /// Waits until what the guest wrote is where it belongs, for a while at the most.
    pub fn flush(&self) {
        if let Some(output) = &self.output {
            // It says itself what was lost.
            let until = deadline::of(Turn::Output).unwrap_or_else(deadline::soon);
            let _ = output.flush(until);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock()
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            // The range of the device is eight registers.
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
