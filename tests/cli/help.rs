// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The options are written once, in `--help`: documents quote it, and it names the keys that there
//! are.

use std::collections::BTreeSet;
use std::fs;

use super::*;

fn help(args: &[&str]) -> String {
    let output = twostage(args);
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

/// Each block of `document` that begins with `$ twostage ARGS --help`: the arguments, and what
/// follows.
fn quoted(document: &str) -> impl Iterator<Item = (Vec<&str>, &str)> {
    let blocks = document.split("\n```\n$ twostage ").skip(1);
    blocks.filter_map(|block| {
        let (args, rest) = block.split_once('\n')?;
        let args: Vec<_> = args.split(' ').collect();
        let text = rest.split("\n```").next()?.split("\n\n$ ").next()?;
        args.contains(&"--help").then_some((args, text))
    })
}

#[test]
fn documents_quote_it() {
    for (document, commands) in [
        ("README.md", &["--help"][..]),
        ("docs/command-line.md", &["run --help", "info --help", "probe --help"]),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(document);
        let text = fs::read_to_string(path).unwrap();
        let quoted: Vec<_> = quoted(&text).collect();
        let found: Vec<_> = quoted.iter().map(|(args, _)| args.join(" ")).collect();
        assert_eq!(found, commands, "{document}");
        for (args, text) in quoted {
            let said = help(&args);
            let said: Vec<_> = said.trim_end().lines().map(str::trim_end).collect();
            let what = format!("{document} is behind `twostage {}`", args.join(" "));
            assert_eq!(text.lines().collect::<Vec<_>>(), said, "{what}");
        }
    }
}

/// The keys in `grammar`: the words before an equals sign.
fn keys(grammar: &str) -> BTreeSet<&str> {
    let word = |part| str::rsplit(part, |c: char| !c.is_ascii_lowercase() && c != '-').next();
    let mut parts: Vec<_> = grammar.split('=').collect();
    parts.pop();
    parts.into_iter().filter_map(word).collect()
}

#[test]
fn it_names_the_keys_that_there_are() {
    let help = help(&["run", "--help"]);
    for (option, value) in [
        ("--cpus", "boot=1"),
        ("--memory", "size=1M"),
        ("--iommu", "vtd"),
        ("--iommu", "smmuv3"),
        ("--device", "edu"),
        ("--disk", "path=disk"),
        ("--net", "tap=tap"),
        ("--rng", "src=source"),
        ("--vfio", "path=device"),
    ] {
        let name = format!("{option} <");
        let grammar = help.split(&name).nth(1).and_then(|rest| rest.split(">\n").next()).unwrap();
        // The model's part, if there are several.
        let model = grammar.split("]|").find(|model| model.starts_with(value)).unwrap_or(grammar);
        let value = format!("{value},no-such-key=1");
        let output = twostage(&["run", "--kernel", "kernel", option, &value]);
        let error = String::from_utf8_lossy(&output.stderr);
        let known =
            error.split("known: ").nth(1).and_then(|known| known.split(" (").next()).unwrap();
        assert!(error.contains("unknown key 'no-such-key'"), "{error}");
        assert_eq!(keys(model), known.split(", ").collect(), "{option} {value}");
    }
}
