// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line, in the style of cloud-hypervisor's.

mod device_options;
mod info_probe;
mod iommu_options;
mod jail_options;
mod options;
mod outputs;
mod restarts;

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use env_logger::Target;

use self::info_probe::{info, probe, InfoArgs, ProbeArgs, INFO_EXIT_CODES, PROBE_EXIT_CODES};
use self::jail_options::JailArgs;
use self::options::{CpusOption, MemoryOption};
use self::outputs::{check_outputs, ReportOption, Reports};
use self::restarts::{continue_output, wait_for_devices, Backoff};
use crate::config::{
    DeviceConfig, DiskConfig, IommuConfig, MachineConfig, ModuleConfig, NetConfig, PayloadConfig,
    PciBridgeConfig, RngConfig, RootPortConfig, SerialConfig, VfioConfig,
};
use crate::console;
use crate::console::output::{self, Output};
use crate::process::overdue::{self, Step};
use crate::process::stop::StopReason;
use crate::process::{exit_code, jail, limits, signals, stack};
use crate::{Error, Machine};

/// A lightweight virtual machine monitor with virtual IOMMUs whose stage-1 tables are walked by
/// hardware.
#[derive(Debug, Parser)]
#[command(name = "twostage", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a virtual machine until its guest ends it.
    #[command(next_line_help = true, after_help = EXIT_CODES)]
    Run(Box<RunArgs>),
    /// Reports what devices and their IOMMUs offer to a virtual IOMMU.
    #[command(after_help = INFO_EXIT_CODES)]
    Info(InfoArgs),
    /// Reports what this machine's KVM can do, and whether Linux runs on it.
    #[command(after_help = PROBE_EXIT_CODES)]
    Probe(ProbeArgs),
}

/// As in [`exit_code`].
const EXIT_CODES: &str = "\
Exit codes:
  What the guest writes to port 0xf4 (arm64: 0x9010000), modulo 256; 0 when it switches the machine off or the
  user types Ctrl-A x; otherwise
   64  the command line contradicts itself
   66  a file is missing or not what it should be
   69  KVM, or something the machine needs of it or of the host's IOMMU, is not there
   70  a bug, such as objects of the host's IOMMU that are left behind
   71  the operating system refused a resource, or does not answer after Ctrl-A x
   74  a file cannot be written
   77  the jail refused a system call, which is an attack or a bug
   80  the guest reset itself
   81  KVM cannot go on with the guest
  128  and the number of the signal that ended the machine";

#[derive(Debug, Clone, Args)]
struct RunArgs {
    /// Kernel: a bzImage, an ELF64 image with a PVH entry, or an ELF32 image with a Multiboot
    /// header; on arm64 an Image.
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,

    /// File that the kernel gets as its initial file system.
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,

    /// File for a kernel with a Multiboot header or a PVH entry; may be given several times, in the
    /// order that the kernel expects. `cmdline` is the rest of the value, including commas: the
    /// file's command line. Xen expects its first domain's kernel, then that one's initramfs.
    #[arg(long = "module", value_name = "path=FILE[,cmdline=TEXT]", conflicts_with = "initramfs")]
    modules: Vec<ModuleConfig>,

    /// Command line of the kernel.
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    cmdline: String,

    /// Number of vCPUs.
    #[arg(long, value_name = "boot=N", default_value = "boot=1")]
    cpus: CpusOption,

    /// Guest memory, such as size=512M or size=2G.
    #[arg(long, value_name = "size=SIZE", default_value = "size=512M")]
    memory: MemoryOption,

    /// Virtual IOMMU; may be given several times. A device selects one by its `id` (`iommu=ID`; by
    /// default vtd0, vtd1 and so on, or smmu0); the default, and `on`, is the first. PCs have
    /// `vtd`, arm64 has `smmuv3`. With `iommu=off` a device's DMA is not translated; MSIs of virtio
    /// devices are remapped nevertheless. PASIDs have `pasid-bits` bits, at most 20: by default up
    /// to 8 behind a vtd, and what the devices' SMMU has behind an smmuv3. IOVAs have `aw` bits.
    /// Granules, invalidation by range (`ril`) and updates of flags in the guest's tables (`httu`)
    /// default to what the devices' SMMU has, which must support what is given. Interrupt remapping
    /// is for all units or none, and moves the IOAPIC out of the kernel; `intremap=off` leaves it
    /// there, and `intremap=on` fails if KVM does not support that. A guest that is a host for
    /// assigned devices nests their tables with `nest=on` (ECAP.NEST). With `host=/dev/iommu` the
    /// kernel translates for assigned devices (--vfio); for others behind the same IOMMU this
    /// process does. Where hardware cannot nest the tables of a vtd's guest, or with `nesting=off`,
    /// they are mirrored, with at most `shadow-pieces` mappings. With `pri=on`, and `ats=on`,
    /// devices ask the guest for pages that are not there (page requests); with `stall=on` an
    /// smmuv3 stalls DMA that faults until the guest resumes it. With `side-core=on` a thread
    /// serves a guest's invalidations, which then cost no exits to this process, or none at all;
    /// `auto` does so while there are many and a processor is free; `side-cpu` is the processor
    /// that the thread is bound to.
    #[arg(
        long = "iommu",
        value_name = "vtd[,id=NAME,aw=48|57,pasid-bits=N,addr=ADDRESS,first-stage=on|off,second-stage=on|off,\
            nest=on|off,nesting=auto|on|off,shadow-pieces=N,ats=on|off,pri=on|off,caching-mode=on|off,\
            intremap=on|off,host=emulated|PATH,side-core=off|on|auto,side-cpu=N,\
            sanitize=on|off]|smmuv3[,id=NAME,addr=ADDRESS,aw=48|52,granules=4K+16K+64K,pasid-bits=N,ats=on|off,\
            pri=on|off,stall=on|off,ril=on|off,httu=off|access|dirty,host=emulated|PATH,side-core=off|on|auto,\
            side-cpu=N,sanitize=on|off]"
    )]
    iommus: Vec<IommuConfig>,

    /// PCIe root port with access control services, for one device or --pci-bridge, which has
    /// `bus=NAME`; may be given several times. Ports are on bus 0, after the devices there. Each
    /// bus has its number from the start; DMA from behind a port whose bus a guest calls otherwise
    /// is blocked.
    #[arg(long = "root-port", value_name = "id=NAME")]
    root_ports: Vec<RootPortConfig>,

    /// Bridge from PCI Express, at a --root-port, to conventional PCI, for devices with `bus=NAME`;
    /// may be given several times. To an IOMMU all these devices are one, as they share a Requester
    /// ID: device 0, function 0 of the bridge's bus.
    #[arg(long = "pci-bridge", value_name = "id=NAME,bus=PORT")]
    pci_bridges: Vec<PciBridgeConfig>,

    /// Whether PCI configuration space is at I/O ports (0xCF8 to 0xCFF), too, beside memory (ECAM).
    /// Linux prefers ports, with two exits for each access. With `off` it uses memory: its reads
    /// are no exits, on bus 0. Kernels that look at devices before they know of ECAM, like Xen,
    /// need the ports.
    #[cfg(target_arch = "x86_64")]
    #[arg(long, value_name = "on|off", default_value = "on",
        action = clap::ArgAction::Set, value_parser = self::options::on_off)]
    pci_ports: bool,

    /// PCI device; may be given several times. The first on bus 0 is 00:01.0. `edu` is QEMU's, with
    /// function-level reset, MSI-X (a vector for each byte of its interrupt status, in BAR 1) and
    /// 16 KiB of memory (BAR 2). With `pasid=on`, or a width, it has the PASID capability; once
    /// software has enabled that, register 0xA0 selects the PASID of its DMA (bits 19:0; bit 31: it
    /// has one). `ats=on` and `pri=on` are the capabilities of a device TLB and of page requests,
    /// and `stall=on` lets an SMMU stall its DMA, all of which its IOMMU must have, too (--iommu).
    #[arg(
        long = "device",
        value_name = "edu[,iommu=on|off|ID,bus=ID,pasid=on|off|BITS,ats=on|off,pri=on|off,stall=on|off,dma-mask=MASK]"
    )]
    devices: Vec<DeviceConfig>,

    /// Virtio block device with a raw image or a block device; may be given several times, after
    /// every --device. format=raw: the image is raw whatever its contents look like. It has one
    /// writer, or several readers (readonly=on): the locks are those of QEMU and cloud-hypervisor,
    /// and a writer of a block device claims it exclusively. It has `queues` queues, by default 1
    /// and at most 64, of which a guest uses no more than it has vCPUs. Requests are made by
    /// io_uring, or where that is forbidden by threads; the report says which.
    #[arg(
        long = "disk",
        value_name = "path=FILE[,readonly=on|off,direct=on|off,format=raw,queues=N,iommu=on|off|ID,bus=ID]"
    )]
    disks: Vec<DiskConfig>,

    /// Virtio network device on a tap interface of the host; may be given several times, after
    /// every --disk.
    #[arg(long = "net", value_name = "tap=NAME|fd=NUMBER[,mac=ADDRESS,iommu=on|off|ID,bus=ID]")]
    nets: Vec<NetConfig>,

    /// Virtio entropy device; may be given several times, after every --net.
    #[arg(long = "rng", value_name = "src=FILE[,iommu=on|off|ID,bus=ID]")]
    rngs: Vec<RngConfig>,

    /// Device of this machine, bound to vfio-pci, to be assigned; may be given several times, after
    /// every --rng. Its folder in sysfs is /sys/bus/pci/devices/ADDRESS. It is behind a virtual
    /// IOMMU with `host=/dev/iommu`, or with `iommu=off` reaches all guest memory at guest-physical
    /// addresses.
    #[arg(long = "vfio", value_name = "path=FOLDER[,id=NAME,iommu=on|off|ID,bus=ID]")]
    vfios: Vec<VfioConfig>,

    /// Backend of the serial port. `tty` is standard input and output; at a terminal, Ctrl-A x ends
    /// the machine, and Ctrl-A h lists the other keys. The guest does not wait for readers: 256 KiB
    /// are buffered, and a message reports what was dropped.
    #[arg(long, value_name = "tty|null|file=PATH", default_value = "tty")]
    serial: SerialConfig,

    /// What happens when the guest resets the machine. A restarted machine is a new one with its
    /// own report; reports and serial output are appended to the files of the old one. After lives
    /// of less than a second the restart is delayed, by at most 8 seconds; it also waits for
    /// pending requests to a slow disk.
    #[arg(long, value_enum, default_value = "exit")]
    on_reset: OnReset,

    /// Format of the reports, at the end and on SIGUSR1, and their destination: standard error, or
    /// a file with the last one; with restarts, the last one of each life.
    #[arg(long, value_name = "none|text|json[,file=PATH]", default_value = "text")]
    report: ReportOption,

    /// Writes a trace of exits, virtual IOMMUs, the host, interrupts and devices: JSON for Perfetto
    /// or Chrome. Each life of a machine that restarts is a process of the trace.
    #[arg(long, value_name = "PATH")]
    trace: Option<PathBuf>,

    #[command(flatten)]
    jail: JailArgs,
}

/// What happens after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnReset {
    /// The command exits.
    Exit,
    /// The machine restarts from the beginning.
    Restart,
}

impl RunArgs {
    fn prepare_jail(&self) -> Result<(), Error> {
        let restarts = self.on_reset == OnReset::Restart;
        let again = restarts.then(|| self.clone().machine_config());
        Ok(jail::prepare(self.jail.settings(again.as_ref())?)?)
    }

    fn machine_config(self) -> MachineConfig {
        let disks = self.disks.into_iter().map(DeviceConfig::Disk);
        let nets = self.nets.into_iter().map(DeviceConfig::Net);
        let rngs = self.rngs.into_iter().map(DeviceConfig::Rng);
        let vfios = self.vfios.into_iter().map(DeviceConfig::Vfio);
        let devices = self.devices.into_iter().chain(disks).chain(nets).chain(rngs).chain(vfios);
        MachineConfig {
            payload: PayloadConfig {
                kernel: self.kernel,
                initramfs: self.initramfs,
                modules: self.modules,
                cmdline: self.cmdline,
            },
            vcpus: self.cpus.boot,
            memory: self.memory.size,
            iommus: self.iommus,
            devices: devices.collect(),
            root_ports: self.root_ports,
            pci_bridges: self.pci_bridges,
            #[cfg(target_arch = "x86_64")]
            pci_ports: self.pci_ports,
            #[cfg(target_arch = "aarch64")]
            pci_ports: false,
            serial: self.serial,
            trace: self.trace,
        }
    }
}

/// The machine that the command line `arguments` asks for. For fuzzers, as the options, which are
/// most of the work, are described once for all.
///
/// # Errors
/// The command line is not understood, or contradicts itself.
#[cfg(feature = "test-support")]
pub fn parsed(arguments: &[std::ffi::OsString]) -> Result<MachineConfig, String> {
    use clap::{CommandFactory, FromArgMatches};

    thread_local! {
        static COMMAND: std::cell::RefCell<clap::Command> = Cli::command().into();
    }
    let cli = COMMAND.with_borrow_mut(|command| {
        let matches = command.try_get_matches_from_mut(arguments);
        let cli = matches.and_then(|mut matches| Cli::from_arg_matches_mut(&mut matches));
        cli.map_err(|error| error.format(command).to_string())
    })?;
    match cli.command {
        Command::Run(args) => {
            let config = args.machine_config();
            config.validate().map_err(|error| error.to_string())?;
            Ok(config)
        }
        Command::Info(_) | Command::Probe(_) => Err("no machine".to_owned()),
    }
}

/// The log filter without `RUST_LOG`. Guests can make `virtio_queue` log without limit; their
/// errors are also logged elsewhere, rate-limited. `vfio_ioctls` warns of what a device lacks.
const LOG_FILTER: &str = "warn,virtio_queue=off,vfio_ioctls=error";

/// Runs the command that the process was started with. The exit code is the guest's, or one of
/// [`exit_code`].
pub fn main() -> ExitCode {
    // An early report request is held until there is something to report; this fails only if
    // everything else does.
    let held = signals::hold();
    stack::grow();
    limits::look();
    let parsed = Cli::try_parse();
    // In this order, before the log has a thread.
    let ready = match &parsed {
        Ok(Cli { command: Command::Run(args) }) => {
            args.prepare_jail().and_then(|()| signals::start())
        }
        _ => Ok(()),
    };
    start_log();
    let code = match (held.and(ready), parsed) {
        (Err(error), _) => fail(&error),
        (_, Err(error)) => usage(&error),
        (_, Ok(cli)) => match cli.command {
            Command::Run(args) => run(*args),
            Command::Info(args) => info(&args),
            Command::Probe(args) => probe(&args),
        },
    };
    overdue::enter(Step::Messages);
    output::end();
    ExitCode::from(code)
}

/// Logs to standard error, without waiting for readers.
fn start_log() {
    let environment = env_logger::Env::default().default_filter_or(LOG_FILTER);
    let mut log = env_logger::Builder::from_env(environment);
    log.format_target(false);
    if let Ok(error) = Output::standard_error() {
        log.target(Target::Pipe(Box::new(error)));
    }
    log.init();
}

fn run(args: RunArgs) -> u8 {
    let report = args.report.clone();
    let on_reset = args.on_reset;
    let mut config = args.machine_config();
    if let Err(contradiction) = check_outputs(&config, report.file()) {
        complain(&contradiction);
        return exit_code::USAGE;
    }
    let mut reports = match report.open() {
        Ok(reports) => reports,
        Err(error) => {
            complain(&error);
            return exit_code::IO_ERROR;
        }
    };
    let (mut unwritten, mut trace) = (false, None);
    // Failing to write a report is no reason to stop a machine.
    let mut live = |config: &MachineConfig, reports: &Reports| {
        let machine = Machine::new(config, trace.take())?;
        trace = machine.trace();
        let to_file = matches!(config.serial, SerialConfig::File(_) | SerialConfig::Append(_));
        machine.run(&mut |report| {
            let written = reports.write(report);
            unwritten = written.is_err() || (to_file && report.console_lost != 0);
            if let Err(error) = written {
                complain(&error);
            }
        })
    };
    let mut backoff = Backoff::default();
    let mut result = backoff.time(|| live(&config, &reports));
    while matches!(result, Ok(StopReason::Reset(_))) && on_reset == OnReset::Restart {
        if console::ended_by_user() {
            result = Ok(StopReason::Escape);
            break;
        }
        backoff.wait();
        if let Some(signal) = wait_for_devices() {
            result = Ok(StopReason::Signal(signal));
            break;
        }
        continue_output(&mut config);
        reports.next_life();
        result = backoff.time(|| live(&config, &reports));
    }
    let traced = trace.is_none_or(|trace| trace.finish());
    match result {
        Ok(reason) => {
            if !reason.is_orderly() {
                complain(&reason);
            }
            match reason.exit_code() {
                0 if unwritten || !traced => exit_code::IO_ERROR,
                code => code,
            }
        }
        Err(error) => fail(&error),
    }
}

/// Reports why there is no machine; returns the exit code.
fn fail(error: &Error) -> u8 {
    complain(error);
    error.exit_code()
}

/// Prints a one-line error message.
fn complain(what: &dyn fmt::Display) {
    output::say(&limits::with_advice(&format!("twostage: error: {what}")));
}

/// Help and version as clap prints them; errors in one line.
fn usage(error: &clap::Error) -> u8 {
    if !error.use_stderr() {
        // Standard output may be closed; nothing can be done about it.
        let _ = error.print();
        return 0;
    }
    let text = error.to_string();
    let line = text
        .lines()
        .take_while(|line| !line.is_empty())
        .map(|line| line.trim().trim_start_matches("error: "))
        .collect::<Vec<_>>()
        .join(" ");
    complain(&format_args!("{line} (see --help)"));
    exit_code::USAGE
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn help_has_the_exit_codes() {
        for code in [
            exit_code::USAGE,
            exit_code::NO_INPUT,
            exit_code::UNAVAILABLE,
            exit_code::SOFTWARE,
            exit_code::OS_ERROR,
            exit_code::IO_ERROR,
            exit_code::REFUSED,
            exit_code::GUEST_RESET,
            exit_code::GUEST_STUCK,
            exit_code::SIGNAL_BASE,
        ] {
            assert!(EXIT_CODES.contains(&format!(" {code}  ")), "{code}");
        }
    }

    #[test]
    fn defaults_make_a_machine() {
        let cli = Cli::try_parse_from(["twostage", "run", "--kernel", "vmlinux"]).unwrap();
        let Command::Run(args) = cli.command else { panic!("{cli:?}") };
        let config = args.machine_config();
        assert_eq!(config.validate(), Ok(()));
        assert_eq!(config.memory, 512 << 20);
        assert_eq!(config.vcpus, 1);
    }

    #[test]
    fn devices_add_up() {
        let words = "twostage run --kernel k --iommu vtd --device edu --device edu,pasid=on";
        let cli = Cli::try_parse_from(words.split(' ')).unwrap();
        let Command::Run(args) = cli.command else { panic!("{cli:?}") };
        assert_eq!(args.devices.len(), 2);
        assert_eq!(args.iommus, [IommuConfig::default()]);
    }
}
