// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts: connects devices to the architecture's interrupt controllers.
//!
//! A line is one of their inputs. A message is remapped on the way, if a virtual IOMMU does that.

pub(super) mod device_line;
mod gsi;
mod messages;
mod routes;

use std::fmt;
use std::sync::{Arc, Weak};

use kvm_ioctls::VmFd;

pub(super) use device_line::{DeviceLine, ResampledLine};
#[cfg(target_arch = "x86_64")]
pub(super) use gsi::set_routing;
use gsi::KvmRouting;
pub use messages::InterruptSource;
pub(super) use messages::Messages;
pub use routes::MsiRoutes;
pub(super) use routes::UnroutedInterrupts;
use routes::{VectorRoute, Writer};

use crate::arch::{EdgeLine, IrqChip, Lines};
use crate::report::InterruptReport;
use crate::trace::Trace;
use crate::Result;
use twostage::spec::pci::Bdf;
use twostage::viommu::routes::RouteTable;
use twostage::viommu::{InterruptListener, InterruptRemapper, InterruptSink, MsiMessage};

/// What a machine's interrupts need.
pub(super) struct Ways {
    /// The machine, which has `chip`.
    pub vm: Arc<VmFd>,
    /// Its interrupt controllers.
    pub chip: IrqChip,
    /// The destination of remapped messages.
    pub messages: Messages,
    pub trace: Option<Arc<Trace>>,
}

/// The interrupts of one machine.
pub(super) struct Interrupts {
    chip: IrqChip,
    table: Arc<RouteTable>,
    lines: Lines,
    routes: Arc<MsiRoutes>,
    messages: Messages,
    trace: Option<Arc<Trace>>,
}

impl Interrupts {
    /// Interrupts through `ways`; `remapper` remaps those that an interrupt controller turns into
    /// messages.
    pub fn new(ways: Ways, remapper: Option<Weak<dyn InterruptRemapper>>) -> Self {
        let routing = KvmRouting { vm: ways.vm.clone(), pins: ways.chip.pin_routes() };
        let gsis = routing.message_gsis();
        let table = Arc::new(RouteTable::new(Arc::new(routing), gsis));
        let routes = MsiRoutes::new(table.clone(), ways.vm.clone());
        let lines = Lines::new(&ways, &table, remapper);
        let Ways { chip, messages, trace, .. } = ways;
        Self { chip, table, lines, routes, messages, trace }
    }

    /// Where the interrupt controllers are.
    pub fn chip(&self) -> IrqChip {
        self.chip
    }

    /// Statistics.
    pub fn report(&self) -> InterruptReport {
        InterruptReport { routed: self.routes.triggered(), route_updates: self.table.updates() }
    }

    /// The inputs of the interrupt controllers.
    pub fn lines(&self) -> &Lines {
        &self.lines
    }

    /// The listeners for changes of interrupt remapping.
    pub fn listeners(&self) -> Vec<Weak<dyn InterruptListener>> {
        self.lines.listener().into_iter().chain([self.routes.listener()]).collect()
    }

    /// The event loop's subscriber for devices that trigger their vectors themselves.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn unrouted(&self) -> Result<UnroutedInterrupts> {
        self.routes.unrouted()
    }

    /// The interrupts of the function at `bdf`, remapped by `remapper`, if any.
    pub fn of_function(
        &self,
        bdf: Bdf,
        remapper: Option<Weak<dyn InterruptRemapper>>,
    ) -> FunctionInterrupts {
        let source = InterruptSource::new(bdf, &bdf.to_string(), remapper, self.trace.clone());
        FunctionInterrupts::new(source, self.messages.of(bdf), self.routes.clone())
    }

    /// The edge-triggered interrupt line `gsi`.
    ///
    /// # Errors
    /// KVM cannot wire it.
    pub fn edge_line(&self, gsi: u32) -> Result<EdgeLine> {
        self.lines.edge(gsi)
    }

    /// Drives the level-triggered interrupt line `gsi`.
    pub fn set_line(&self, gsi: u32, level: bool) {
        self.lines.set(gsi, level);
    }
}

impl fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interrupts")
            .field("chip", &self.chip)
            .field("lines", &self.lines)
            .field("routes", &self.routes)
            .finish_non_exhaustive()
    }
}

/// The interrupts of one function. A message sent through its [`InterruptSink`] is remapped each
/// time; frequent ones have a [`VectorRoute`].
#[derive(Clone)]
pub struct FunctionInterrupts {
    source: InterruptSource,
    messages: Arc<dyn InterruptSink>,
    routes: Arc<MsiRoutes>,
}

impl FunctionInterrupts {
    fn new(
        source: InterruptSource,
        messages: Arc<dyn InterruptSink>,
        routes: Arc<MsiRoutes>,
    ) -> Self {
        Self { source, messages, routes }
    }

    /// A route for one vector of the function.
    ///
    /// # Errors
    /// KVM has no more GSIs, or the process no more file descriptors.
    pub fn vector(&self) -> Result<Arc<VectorRoute>> {
        self.routes.allocate(self.source.clone(), self.messages.clone(), Writer::Here)
    }

    /// The same for a vector that the device triggers itself, by writing the route's eventfd.
    ///
    /// # Errors
    /// As [`FunctionInterrupts::vector`].
    pub fn device_vector(&self) -> Result<Arc<VectorRoute>> {
        self.routes.allocate(self.source.clone(), self.messages.clone(), Writer::Device)
    }
}

impl InterruptSink for FunctionInterrupts {
    fn send_msi(&self, address: u64, data: u32) {
        self.source.send(MsiMessage { address, data }, &*self.messages);
    }
}

impl fmt::Debug for FunctionInterrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FunctionInterrupts").field(&self.source).finish()
    }
}
