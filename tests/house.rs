// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! House rules that no compiler checks: no circular imports between files, limits on the size of
//! files and folders, short examples without `unsafe`, comments within 100 columns, the same file
//! names for both architectures, features and links in what users read.
//!
//! Imports are parsed as text: `use` items and paths that begin with `crate`, `super` or `self`.
//! Reexports of a module (`pub use`) count for their users, not for the module. A module and its
//! submodules may import each other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const PACKAGES: [&str; 4] = ["twostage", "emulated", "vmm", "preload"];
/// Maximum lines of a file.
const LONGEST: usize = 500;
/// Maximum lines of what is to show that little is needed, by a part of the path.
const SHORT: [(&str, usize); 2] = [("/examples/", 160), ("tests/library/adapter.rs", 150)];
/// Maximum entries of a folder.
const FULLEST: usize = 20;
/// Maximum columns of a comment.
const WIDEST: usize = 100;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The Rust files below `folder`, as relative paths, and the number of entries of each folder.
fn files(folder: &Path) -> (Vec<PathBuf>, BTreeMap<PathBuf, usize>) {
    let (mut found, mut sizes, mut open) = (Vec::new(), BTreeMap::new(), vec![folder.to_owned()]);
    while let Some(next) = open.pop() {
        // Packages have links to the licences.
        let entries: Vec<_> = fs::read_dir(&next)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| !path.is_symlink())
            .collect();
        sizes.insert(next, entries.len());
        for path in entries {
            if path.is_dir() {
                if !path.ends_with("target") {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    (found, sizes)
}

/// A module path, such as `["viommu", "vtd"]`.
type Module = Vec<String>;

/// The module of the file at `path` in a package.
fn module(path: &Path) -> Module {
    let mut parts: Module =
        path.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if parts.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        parts.pop();
    }
    parts
}

fn is_test(path: &Path) -> bool {
    path.iter().any(|part| {
        let name = part.to_str().unwrap().trim_end_matches(".rs");
        ["tests", "testing"].contains(&name) || name.ends_with("_tests")
    })
}

/// `text` without comments and without the tests at its end.
fn code(text: &str) -> String {
    let text = text.split("\nmod tests {").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The paths in `tree`, as in a `use`: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths(tree: &str) -> Vec<Module> {
    let tree = tree.trim();
    let Some((before, rest)) = tree.split_once('{') else {
        let name = tree.split(" as ").next().unwrap();
        return vec![name.split("::").map(|part| part.trim().to_owned()).collect()];
    };
    let inside = rest.trim_end().strip_suffix('}').unwrap_or(rest);
    let (mut depth, mut start, mut parts) = (0, 0, Vec::new());
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            b',' if depth == 0 => {
                parts.push(&inside[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&inside[start..]);
    let prefix: Module = before
        .split("::")
        .map(|part| part.trim().to_owned())
        .filter(|part| !part.is_empty())
        .collect();
    let with_prefix = |path: Module| prefix.iter().cloned().chain(path).collect();
    parts
        .iter()
        .filter(|part| !part.trim().is_empty())
        .flat_map(|part| paths(part))
        .map(with_prefix)
        .collect()
}

/// One package: its modules, their reexports, and their imports.
#[derive(Default)]
struct Package {
    files: BTreeMap<Module, PathBuf>,
    given_on: BTreeMap<(Module, String), Module>,
    imports: Vec<(Module, Module)>,
}

impl Package {
    fn read(folder: &Path) -> Self {
        let mut package = Self::default();
        let read: Vec<_> = files(folder)
            .0
            .into_iter()
            .map(|path| path.strip_prefix(folder).unwrap().to_owned())
            .filter(|path| !is_test(path))
            .collect();
        for path in &read {
            package.files.insert(module(path), path.clone());
        }
        for path in &read {
            package.add(&module(path), &code(&fs::read_to_string(folder.join(path)).unwrap()));
        }
        package
    }

    /// Adds the `code` of `module`.
    fn add(&mut self, module: &Module, code: &str) {
        let mut rest = String::new();
        for item in code.split(';') {
            let item = item.trim_start();
            let start = item.rfind("\nuse ").or_else(|| item.rfind("\npub")).map_or(0, |at| at + 1);
            let statement = &item[start..];
            let (is_public, tree) = match statement.split_once("use ") {
                Some(("", tree)) => (false, tree),
                Some((visibility, tree))
                    if visibility.starts_with("pub") && !visibility.contains('{') =>
                {
                    (true, tree)
                }
                _ => {
                    rest.push_str(item);
                    continue;
                }
            };
            rest.push_str(&item[..start]);
            for path in paths(tree) {
                let Some(target) = self.absolute(module, &path) else { continue };
                if is_public {
                    let name = target.last().unwrap().clone();
                    self.given_on.insert((module.clone(), name), target);
                } else {
                    self.imports.push((module.clone(), target));
                }
            }
        }
        // Paths outside of `use` items.
        for (at, _) in rest.match_indices("crate::").chain(rest.match_indices("super::")) {
            let before = rest[..at].chars().next_back();
            if before
                .is_some_and(|before| before.is_alphanumeric() || before == ':' || before == '$')
            {
                continue;
            }
            let path = &rest[at..];
            let end = path.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
            let path = paths(path[..end.unwrap_or(path.len())].trim_end_matches(':')).remove(0);
            if let Some(target) = self.absolute(module, &path) {
                self.imports.push((module.clone(), target));
            }
        }
    }

    /// `path`, as written in `module`, relative to the root of the package; `None` if it is in
    /// another package.
    fn absolute(&self, module: &Module, path: &Module) -> Option<Module> {
        let mut from = module.clone();
        let mut rest = path.as_slice();
        match rest.first()?.as_str() {
            "crate" => from.clear(),
            "self" => {}
            "super" => {
                while rest.first().is_some_and(|part| part == "super") {
                    from.pop()?;
                    rest = &rest[1..];
                }
                return Some(from.into_iter().chain(rest.iter().cloned()).collect());
            }
            child => {
                let mut inner = module.clone();
                inner.push(child.to_owned());
                return self
                    .files
                    .contains_key(&inner)
                    .then(|| module.iter().cloned().chain(rest.iter().cloned()).collect());
            }
        }
        Some(from.into_iter().chain(rest[1..].iter().cloned()).collect())
    }

    /// The module that defines `target`, following reexports.
    fn home(&self, target: &Module) -> Option<Module> {
        let mut target = target.clone();
        for _ in 0..8 {
            let length =
                (0..=target.len()).rev().find(|&n| self.files.contains_key(&target[..n]))?;
            let (module, rest) = (target[..length].to_vec(), &target[length..]);
            let name = rest.first().cloned().unwrap_or_default();
            match self.given_on.get(&(module.clone(), name)) {
                Some(next) => target = next.iter().chain(&rest[1..]).cloned().collect(),
                _ => return Some(module),
            }
        }
        None
    }

    /// The imports of each module.
    fn arrows(&self) -> BTreeMap<Module, BTreeSet<Module>> {
        let mut arrows = BTreeMap::<Module, BTreeSet<Module>>::new();
        for (from, target) in &self.imports {
            let apart = |to: &Module| !from.starts_with(to) && !to.starts_with(from);
            if let Some(to) = self.home(target).filter(apart) {
                arrows.entry(from.clone()).or_default().insert(to);
            }
        }
        arrows
    }
}

/// Everything reachable from `start`, in at least one step.
fn reached<'a>(
    arrows: &'a BTreeMap<Module, BTreeSet<Module>>,
    start: &'a Module,
) -> BTreeSet<&'a Module> {
    let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
    while let Some(next) = open.pop() {
        open.extend(arrows.get(next).into_iter().flatten().filter(|to| seen.insert(*to)));
    }
    seen
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut circles = Vec::new();
    for name in PACKAGES {
        let package = Package::read(&root().join("src").join(name));
        let arrows = package.arrows();
        assert!(arrows.len() > 10, "{name}: the imports are not understood");
        for module in arrows.keys().filter(|module| reached(&arrows, module).contains(module)) {
            let back = |to: &&Module| reached(&arrows, to).contains(module);
            let tied: Vec<_> =
                arrows[module].iter().filter(back).map(|to| &package.files[to]).collect();
            circles.push(format!("{name}: {:?} imports from {tied:?}", package.files[module]));
        }
    }
    assert!(
        circles.is_empty(),
        "files that import each other in a circle:\n{}",
        circles.join("\n")
    );
}

#[test]
fn no_file_and_no_folder_is_too_large() {
    let mut too_large = Vec::new();
    for folder in ["src", "tests", "benches"] {
        let (files, folders) = files(&root().join(folder));
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            let lines = text.lines().count();
            if lines > LONGEST {
                too_large.push(format!("{}: {lines} lines", file.display()));
            }
            let wide = |line: &&str| {
                line.trim_start().starts_with("//")
                    && line.chars().count() > WIDEST
                    && !line.contains("| ")
            };
            if let Some(line) = text.lines().find(wide) {
                too_large.push(format!("{}: {line}", file.display()));
            }
        }
        // The fuzzers' seeds are data.
        let room = |path: &Path| !path.iter().any(|part| part == "seeds");
        for (path, entries) in
            folders.into_iter().filter(|(path, entries)| *entries > FULLEST && room(path))
        {
            too_large.push(format!("{}: {entries} entries", path.display()));
        }
    }
    assert!(too_large.is_empty(), "{}", too_large.join("\n"));
}

/// What is wrong with the file at `path`, one of [`SHORT`]: it is long, or unsafe.
fn not_as_shown(path: &str, text: &str) -> Option<String> {
    let (_, most) = SHORT.into_iter().find(|(part, _)| path.contains(part))?;
    let lines = text.lines().count();
    let is_unsafe = code(text).split(|c: char| !c.is_alphanumeric()).any(|word| word == "unsafe");
    let wrong = lines > most || is_unsafe;
    wrong.then(|| format!("{path}: {lines} lines of {most}, unsafe: {is_unsafe}"))
}

#[test]
fn examples_and_the_adapter_are_short_and_safe() {
    let all = ["src", "tests"].map(|folder| files(&root().join(folder)).0).concat();
    let all = all.iter().map(|path| path.to_str().unwrap());
    let shown: Vec<_> =
        all.filter(|path| SHORT.iter().any(|(part, _)| path.contains(part))).collect();
    assert!(shown.len() > 5 && shown.iter().any(|path| path.ends_with("adapter.rs")), "{shown:?}");
    let wrong = |path: &&str| not_as_shown(path, &fs::read_to_string(path).unwrap());
    assert_eq!(shown.iter().filter_map(wrong).collect::<Vec<_>>(), [""; 0]);

    let (example, adapter) = ("src/vmm/examples/a.rs", "tests/library/adapter.rs");
    for (path, most) in [(example, 160), (adapter, 150)] {
        assert_eq!(not_as_shown(path, &"\n".repeat(most)), None);
        assert!(not_as_shown(path, &"\n".repeat(most + 1)).is_some());
        assert_eq!(not_as_shown(path, "// unsafe\nlet unsafely = 1;"), None);
        assert!(not_as_shown(path, "let it = unsafe { it() };").is_some());
    }
}

/// Both architectures can be read side by side: files with the same purpose have the same name.
/// Listed here are the files that only one of them has.
#[test]
fn files_of_both_architectures_have_the_same_names() {
    let names = |folder: &str| -> BTreeSet<String> {
        let entries = fs::read_dir(root().join("src/twostage").join(folder)).unwrap();
        let stem = |path: PathBuf| path.file_stem().unwrap().to_str().unwrap().to_owned();
        entries.map(|entry| stem(entry.unwrap().path())).collect()
    };
    for (one, other, alone) in [
        (
            "viommu/vtd",
            "viommu/smmuv3",
            &["evaluation", "output_queue", "remapping", "stalls", "walk"][..],
        ),
        ("nesting/vtd", "nesting/smmuv3", &["nested", "shadow"]),
    ] {
        let (one, other) = (names(one), names(other));
        assert_eq!(one.symmetric_difference(&other).collect::<Vec<_>>(), alone);
    }
}

/// A VMM uses the virtual IOMMUs of both architectures by the same verbs, in the same order. Only
/// an SMMUv3's host keeps events, and only a VT-d's tables are mirrored.
#[test]
fn units_of_both_architectures_have_the_same_verbs() {
    let verbs = |file: &str| -> Vec<String> {
        let text = fs::read_to_string(root().join("src/twostage/unit").join(file)).unwrap();
        let named = text.split("\n    pub fn ").skip(1);
        named.map(|rest| rest.split(['(', '<']).next().unwrap().to_owned()).collect()
    };
    let [mut vtd, mut smmuv3] = ["vtd.rs", "smmuv3.rs"].map(verbs);
    let all = [vtd.len(), smmuv3.len()];
    vtd.remove(vtd.iter().position(|verb| verb == "nesting").unwrap());
    smmuv3.retain(|verb| verb != "event_depth");
    assert_eq!([vtd.len() + 1, smmuv3.len() + 1], all);
    assert_eq!(vtd, smmuv3);
}

/// What a user of the packages reads leads somewhere: every feature is explained in the crate's
/// documentation, docs.rs builds all of them for both architectures, and links lead to files.
#[test]
fn what_users_read_is_complete() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let mut missing = Vec::new();
    for package in ["twostage", "emulated", "vmm"] {
        let manifest = read(&format!("src/{package}/Cargo.toml"));
        let section = |name: &str| {
            let rest = manifest.split_once(&format!("[{name}]\n")).map_or("", |(_, rest)| rest);
            rest.split("\n[").next().unwrap().to_owned()
        };
        let docs = read(&format!("src/{package}/lib.rs"));
        let explained = |feature: &str| docs.contains(&format!("//! * `{feature}`: "));
        let features = section("features");
        let features = features.lines().filter_map(|line| line.split_once(" = "));
        let unexplained = features.map(|(name, _)| name).filter(|name| !explained(name));
        missing.extend(unexplained.map(|name| format!("src/{package}/lib.rs: feature {name}")));
        let docs_rs = section("package.metadata.docs.rs");
        for part in ["all-features = true", "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"]
        {
            if !docs_rs.contains(part) {
                missing.push(format!("src/{package}/Cargo.toml: {part} for docs.rs"));
            }
        }
    }
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let pages =
        ["README.md", "CHANGELOG.md", "guest-images/README.md"].map(|page| root().join(page));
    for page in pages.into_iter().chain(docs.filter(|path| path.extension() == Some("md".as_ref())))
    {
        let text = fs::read_to_string(&page).unwrap();
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for link in links.filter(|link| !link.starts_with("https://") && !link.starts_with('#')) {
            let file = link.split('#').next().unwrap();
            if !page.with_file_name(file).exists() {
                missing.push(format!("{}: {link} leads nowhere", page.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

/// The test harness hides what passing tests print.
#[test]
fn what_is_not_tested_is_said_where_it_is_seen() {
    let quiet = |line: &str| {
        let line = line.split("//").next().unwrap().to_lowercase();
        let words = ["not tested", "not run", "skip"];
        line.contains("println!(\"") && words.iter().any(|word| line.contains(word))
    };
    let mut wrong = Vec::new();
    for path in ["src", "tests"].into_iter().flat_map(|folder| files(&root().join(folder)).0) {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().zip(1..).filter(|(line, _)| quiet(line));
        wrong.extend(lines.map(|(_, number)| format!("{}:{number}", path.display())));
    }
    assert_eq!(wrong, [""; 0], "twostage::skips::not_tested says it");
}

#[test]
fn a_circle_is_found() {
    let mut package = Package::default();
    for name in ["a", "b", "c"] {
        package.files.insert(vec![name.to_owned()], format!("{name}.rs").into());
    }
    package.files.insert(Vec::new(), "lib.rs".into());
    package.files.insert(vec!["d".to_owned()], "d/mod.rs".into());
    package.add(&vec!["a".to_owned()], "use crate::{d::B, c::{self, C as D}};\nfn a() {}\n");
    package.add(&vec!["b".to_owned()], "fn b() -> super::c::C { todo!() }\n");
    package.add(&vec!["c".to_owned()], "use std::fmt;\nuse super::a::A;\n");
    package.add(&vec!["d".to_owned()], "pub use super::b::B;\n");
    package.add(&Vec::new(), "mod a;\nuse a::A;\n");
    let arrows = package.arrows();
    let of =
        |name: &str| arrows[&vec![name.to_owned()]].iter().flatten().cloned().collect::<Vec<_>>();
    assert_eq!([of("a"), of("b"), of("c")], [vec!["b", "c"], vec!["c"], vec!["a"]]);
    assert!(!arrows.contains_key(&Vec::new()));
    assert!(reached(&arrows, &vec!["b".to_owned()]).contains(&vec!["b".to_owned()]));
}
