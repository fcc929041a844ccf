// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Executes a target with files, without libFuzzer:
//!
//!   replay TARGET FILE|FOLDER...
//!
//! It names those that fail.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs, io};

use twostage_fuzz::TARGETS;

/// `path`, or if it is a folder, the files in it.
fn files(path: &Path) -> io::Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut all: Vec<_> =
        fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    all.sort();
    Ok(all)
}

/// Executes the files at `path`. Returns how many fail.
fn replay(run: fn(&[u8]), path: &Path) -> io::Result<usize> {
    let mut failed = 0;
    for file in files(path)? {
        let bytes = fs::read(&file)?;
        if std::panic::catch_unwind(|| run(&bytes)).is_err() {
            eprintln!("{} fails", file.display());
            failed += 1;
        }
    }
    Ok(failed)
}

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some((_, run)) = TARGETS.iter().find(|(target, _)| name == *target) else {
        let all: Vec<_> = TARGETS.iter().map(|(target, _)| *target).collect();
        eprintln!("usage: replay TARGET FILE|FOLDER...; targets: {}", all.join(" "));
        return ExitCode::from(64);
    };
    let mut failed = 0;
    for path in arguments.map(PathBuf::from) {
        match replay(*run, &path) {
            Ok(number) => failed += number,
            Err(error) => {
                eprintln!("{}: {error}", path.display());
                return ExitCode::from(66);
            }
        }
    }
    ExitCode::from(u8::from(failed > 0))
}
