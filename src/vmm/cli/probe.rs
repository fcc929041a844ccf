// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `twostage probe`.

use std::io::{self, Write};

use clap::{Args, ValueEnum};

use super::complain;
use crate::arch::probe::Probe;
use crate::process::exit_code;

/// Exit codes of the subcommand.
pub(super) const EXIT_CODES: &str = "\
Exit codes:
    0  Linux runs on this machine's KVM
    1  it does not
   64  the command line cannot be understood
   69  there is no KVM, or it lacks what every guest needs
   71  the operating system or KVM refused a resource
   74  the result cannot be written";

/// Linux runs.
const RUNS: u8 = 0;
/// Linux does not run.
const DOES_NOT: u8 = 1;

#[derive(Debug, Args)]
pub(super) struct ProbeArgs {
    /// Format of the result on standard output: everything, its last line only, or JSON.
    #[arg(long, value_enum, default_value = "text")]
    report: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Text,
    Line,
    Json,
}

/// Probes and reports; returns the exit code.
pub(super) fn probe(args: &ProbeArgs) -> u8 {
    let probe = match Probe::new() {
        Ok(probe) => probe,
        Err(error) => {
            complain(&error);
            return error.exit_code();
        }
    };
    match write(&probe, args.report) {
        Ok(()) if probe.linux => RUNS,
        Ok(()) => DOES_NOT,
        Err(error) => {
            complain(&format_args!("--report: {error}"));
            exit_code::IO_ERROR
        }
    }
}

fn write(probe: &Probe, form: Form) -> io::Result<()> {
    let text = match form {
        Form::Text => probe.to_string(),
        Form::Line => probe.verdict() + "\n",
        Form::Json => serde_json::to_string_pretty(probe)? + "\n",
    };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
