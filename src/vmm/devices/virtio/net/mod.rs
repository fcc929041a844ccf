// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The network device (virtio 1.3 §5.1), one pair of queues on a tap interface.
//!
//! The tap interface uses the same headers as the device, so checksum and segmentation offloads of
//! the driver are passed to the host's network stack.

mod tap;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::str::FromStr;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
};

use super::backend::{Backend, Features, Model};
use super::chain::{Broken, Chain, NotCopied, Unserved};
use super::memory::DeviceMemory;
use super::queue::{Interrupts, Virtqueue, BATCH};
use twostage::ratelimit::RateLimit;

pub use tap::{Tap, TapError};

/// The receive queue.
const RECEIVE: usize = 0;
/// The transmit queue.
const TRANSMIT: usize = 1;
/// Size of each queue.
const QUEUE_SIZE: u16 = 256;
/// The longest frame of the host's stack, including the header: 64 KiB and a link-layer header.
const MAX_FRAME: usize = Tap::HEADER_SIZE + 65_536 + 18;
/// The shortest: both headers.
const MIN_FRAME: usize = Tap::HEADER_SIZE + 14;
/// Header: the number of buffers of a frame (§5.1.6).
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Features of the driver, and the tap interface's flags for them.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// The network device.
#[derive(Debug)]
pub struct Net<L> {
    link: L,
    mac: MacAddress,
    /// A received frame for which the driver has no buffer yet.
    incoming: Vec<u8>,
    incoming_length: usize,
    outgoing: Vec<u8>,
    /// A frame may span several buffers of the driver.
    mergeable: bool,
    /// The interface is gone, which was said.
    gone: bool,
    failures: RateLimit,
}

/// The result of looking for a frame.
enum Arrival {
    /// There is one.
    Frame,
    /// There was one, and it is dropped.
    Lost,
    /// There may be one, but reading it failed.
    Failed,
    /// There is none.
    Nothing,
}

/// The driver's buffers for a frame.
enum Buffers {
    /// These.
    Enough(Vec<Chain>),
    /// Not enough yet.
    NotYet,
    /// Even a full queue is too small.
    NeverEnough,
}

impl<L: FrameLink> Net<L> {
    /// A device with address `mac` on `link`.
    pub fn new(link: L, mac: MacAddress) -> Self {
        Self {
            link,
            mac,
            incoming: vec![0; MAX_FRAME],
            incoming_length: 0,
            outgoing: vec![0; MAX_FRAME],
            mergeable: false,
            gone: false,
            failures: RateLimit::default(),
        }
    }

    /// Delivers received frames to the driver while it has buffers, at most one queue full, and
    /// interrupts it for all of them together.
    fn receive(
        &mut self,
        queue: &mut Virtqueue,
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        let received = self.receive_frames(queue, memory);
        // Also of what was delivered before an error.
        let told = queue.interrupt(memory);
        let more = received?;
        told.map(|()| more)
    }

    fn receive_frames(
        &mut self,
        queue: &mut Virtqueue,
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        queue.disable_notification(memory)?;
        let mut failed = 0;
        for number in 0..QUEUE_SIZE {
            if number % BATCH == 0 {
                queue.interrupt(memory)?;
            }
            if self.incoming_length == 0 {
                match self.next_frame() {
                    Arrival::Frame => {}
                    Arrival::Lost => continue,
                    Arrival::Failed => {
                        failed += 1;
                        continue;
                    }
                    // Whether there are buffers or not, there is nothing to put in.
                    Arrival::Nothing => return Ok(false),
                }
            }
            match self.take_buffers(queue, memory)? {
                Buffers::Enough(chains) => self.deliver(&chains, queue, memory)?,
                Buffers::NeverEnough => self.incoming_length = 0,
                Buffers::NotYet => return Ok(false),
            }
        }
        // An interface that is gone fails for ever: then wait for new input.
        Ok(failed < QUEUE_SIZE)
    }

    /// Takes the next received frame, if there is one. An error concerns one frame only; the next
    /// may be better.
    fn next_frame(&mut self) -> Arrival {
        match self.link.receive(&mut self.incoming) {
            Ok(length) if length < MIN_FRAME => Arrival::Lost,
            Ok(length) => {
                self.incoming_length = length;
                Arrival::Frame
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Arrival::Nothing,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Arrival::Failed,
            Err(error) if is_gone(&error) => {
                say_gone(&self.link, &mut self.gone);
                Arrival::Nothing
            }
            Err(error) => {
                let link = self.link.name();
                self.failures.warn(format_args!("net: {link}: no frame is received: {error}"));
                Arrival::Failed
            }
        }
    }

    /// Takes as many buffers as the frame needs; or none, with notifications enabled.
    fn take_buffers(
        &self,
        queue: &mut Virtqueue,
        memory: &mut DeviceMemory,
    ) -> Result<Buffers, Unserved> {
        let limit = if self.mergeable { usize::from(queue.size()) } else { 1 };
        let (mut chains, mut room) = (Vec::new(), 0);
        // An iteration takes a buffer, or finds none and looks again.
        for _ in 0..2 * limit {
            match queue.pop(memory)? {
                Some(chain) => {
                    room += chain.writable();
                    chains.push(chain);
                    if room >= self.incoming_length as u64 {
                        return Ok(Buffers::Enough(chains));
                    }
                    if chains.len() == limit {
                        break;
                    }
                }
                None if queue.enable_notification(memory)? => queue.disable_notification(memory)?,
                None => {
                    queue.undo_pops();
                    return Ok(Buffers::NotYet);
                }
            }
        }
        queue.undo_pops();
        Ok(Buffers::NeverEnough)
    }

    /// Writes the frame to the buffers of `chains`, and returns them to the driver together, which
    /// is to be interrupted. A frame whose buffers cannot be accessed is dropped; one that may not
    /// be delivered now waits.
    fn deliver(
        &mut self,
        chains: &[Chain],
        queue: &mut Virtqueue,
        memory: &mut DeviceMemory,
    ) -> Result<(), Unserved> {
        let length = self.incoming_length;
        // There are no more chains than descriptors.
        let count = chains.len() as u16;
        self.incoming[NUM_BUFFERS].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.incoming[..length];
        let mut used = Vec::with_capacity(chains.len());
        let mut reached = true;
        for chain in chains {
            let (part, after) = rest.split_at(rest.len().min(chain.writable() as usize));
            reached = reached
                && match chain.write(memory, 0, part) {
                    Ok(()) => true,
                    Err(NotCopied::Unreachable) => false,
                    Err(NotCopied::NotNow(not_now)) => return Err(not_now.into()),
                };
            // A frame has less than 2^32 bytes.
            used.push((chain.head(), part.len() as u32));
            rest = after;
        }
        if !reached {
            used.iter_mut().for_each(|(_, written)| *written = 0);
        }
        queue.give_back(memory, &used)?;
        self.incoming_length = 0;
        let counters = queue.counters();
        if reached { &counters.done } else { &counters.unreachable }.count();
        Ok(())
    }

    /// Sends the driver's frames. Frames that are malformed, cannot be accessed or do not fit are
    /// dropped.
    fn transmit(
        &mut self,
        queue: &mut Virtqueue,
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        let counters = queue.counters();
        queue.drain(memory, Interrupts::Together, |memory, chain| {
            let length = chain.readable();
            if length <= Tap::HEADER_SIZE as u64 || length > MAX_FRAME as u64 {
                return Ok(0);
            }
            // At most MAX_FRAME, the length of the buffer.
            let frame = &mut self.outgoing[..length as usize];
            match chain.read(memory, 0, frame) {
                Ok(()) => match self.link.send(frame) {
                    Ok(()) => {}
                    Err(error) if is_gone(&error) => say_gone(&self.link, &mut self.gone),
                    // As any network does.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        log::debug!("net: a frame is lost: {error}");
                    }
                    Err(error) => {
                        let link = self.link.name();
                        let down = match error.raw_os_error() {
                            Some(libc::EIO) => "; is the interface up?",
                            _ => "",
                        };
                        let lost = format_args!("net: {link}: a frame is lost: {error}{down}");
                        self.failures.warn(lost);
                    }
                },
                Err(NotCopied::Unreachable) => counters.unreachable.count(),
                Err(NotCopied::NotNow(not_now)) => return Err(not_now.into()),
            }
            Ok(0)
        })
    }
}

/// Whether the interface was removed: nothing will ever come from it again.
fn is_gone(error: &io::Error) -> bool {
    // Of tun, of a removed device, and of macvtap.
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::ENOLINK))
}

/// Says once that the interface of `link` is gone.
fn say_gone(link: &impl FrameLink, gone: &mut bool) {
    if !std::mem::replace(gone, true) {
        log::warn!(
            "net: {}: the interface is gone: the guest's frames are lost, and it gets none, until \
             the machine is started again",
            link.name()
        );
    }
}

impl<L: FrameLink> Backend for Net<L> {
    fn model(&self) -> Model {
        let features = Features::default()
            .with(VIRTIO_NET_F_MAC)
            .with(VIRTIO_NET_F_CSUM)
            .with(VIRTIO_NET_F_GUEST_CSUM)
            .with(VIRTIO_NET_F_HOST_TSO4)
            .with(VIRTIO_NET_F_HOST_TSO6)
            .with(VIRTIO_NET_F_HOST_ECN)
            .with(VIRTIO_NET_F_GUEST_TSO4)
            .with(VIRTIO_NET_F_GUEST_TSO6)
            .with(VIRTIO_NET_F_GUEST_ECN)
            .with(VIRTIO_NET_F_MRG_RXBUF);
        Model {
            name: "net",
            device_type: VIRTIO_ID_NET as u16,
            class: 0x02_0000,
            features,
            queue_sizes: &[QUEUE_SIZE; 2],
            config: self.mac.0.to_vec(),
        }
    }

    fn host(&self) -> String {
        self.link.name().to_owned()
    }

    fn start(&mut self, features: Features) -> Result<(), Broken> {
        self.incoming_length = 0;
        self.mergeable = features.has(VIRTIO_NET_F_MRG_RXBUF);
        match self.link.set_offloads(features) {
            Err(error) if is_gone(&error) => say_gone(&self.link, &mut self.gone),
            result => {
                result.map_err(|error| Broken::Device(format!("setting offloads: {error}")))?;
            }
        }
        Ok(())
    }

    fn input(&self) -> Option<RawFd> {
        Some(self.link.as_raw_fd())
    }

    fn input_queue(&self) -> usize {
        RECEIVE
    }

    fn serve(
        &mut self,
        number: usize,
        queues: &mut [Virtqueue],
        memory: &mut DeviceMemory,
    ) -> Result<bool, Unserved> {
        let Some(queue) = queues.get_mut(number) else { return Ok(false) };
        match number {
            RECEIVE => self.receive(queue, memory),
            TRANSMIT => self.transmit(queue, memory),
            _ => Ok(false),
        }
    }
}

/// Source and sink of frames, each with a virtio-net header in front. Nothing blocks; the file
/// descriptor is readable when there is a frame.
pub trait FrameLink: AsRawFd + Send {
    /// Its name in messages.
    fn name(&self) -> &str;

    /// Receives a frame.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize>;

    /// Sends a frame.
    ///
    /// # Errors
    /// The system's error; the frame is dropped.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;

    /// Received frames may be as a driver that accepted `features` takes them: with partial
    /// checksums, or longer than the MTU.
    ///
    /// # Errors
    /// The system's error.
    fn set_offloads(&mut self, features: Features) -> io::Result<()>;
}

impl FrameLink for Tap {
    fn name(&self) -> &str {
        Tap::name(self)
    }

    fn receive(&mut self, data: &mut [u8]) -> io::Result<usize> {
        Tap::receive(self, data)
    }

    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        Tap::send(self, frame)
    }

    fn set_offloads(&mut self, features: Features) -> io::Result<()> {
        // The others depend on the first (virtio 1.3 §5.1.3.1).
        let flags = match features.has(VIRTIO_NET_F_GUEST_CSUM) {
            true => {
                OFFLOADS.iter().filter(|(bit, _)| features.has(*bit)).map(|(_, flag)| flag).sum()
            }
            false => 0,
        };
        self.set_offload(flags)
    }
}

/// A unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// A locally administered address for device `number` of a machine.
    pub fn local(number: u8) -> Self {
        Self([0x02, 0x74, 0x73, 0x00, 0x00, number])
    }
}

/// Not a unicast MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a MAC address of one device, such as 02:00:00:00:00:01")]
pub struct NoMac;

impl FromStr for MacAddress {
    type Err = NoMac;

    fn from_str(text: &str) -> Result<Self, NoMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            // `from_str_radix` would accept a sign.
            let is_byte = |part: &&str| {
                part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit())
            };
            let part = parts.next().filter(is_byte).ok_or(NoMac)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| NoMac)?;
        }
        // The lowest bit of the first byte marks group addresses.
        let one_device = bytes[0] & 1 == 0 && bytes != [0; 6];
        match parts.next() {
            None if one_device => Ok(Self(bytes)),
            _ => Err(NoMac),
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
