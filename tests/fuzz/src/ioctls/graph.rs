// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of an iommufd as a graph, and its text.

use twostage::iommufd::ObjectId;
use twostage_emulated::{EmulatedHost, GraphEdge, GraphObject, ObjectGraph};

/// The graph of `host`, in which every object's dependencies exist.
pub fn checked(host: &EmulatedHost) -> ObjectGraph {
    let graph = host.graph();
    assert_eq!(graph.objects.len(), host.live_objects());
    for object in &graph.objects {
        for edge in &object.on {
            assert!(
                graph.objects.iter().any(|other| other.id == edge.to),
                "{object} stands on {}, which is not there",
                edge.to
            );
        }
    }
    graph
}

/// Below each object, the text has all objects that are on it, and nothing else; the last line says
/// how many there are.
pub fn check_text(graph: &ObjectGraph) {
    let text = graph.to_string();
    let mut lines: Vec<_> = text.lines().collect();
    let (objects, bytes) = (graph.objects.len(), graph.pinned_bytes);
    let end = format!("{objects} objects, {bytes:#x} bytes pinned");
    assert_eq!(lines.pop(), Some(&*end), "{text}");
    let roots = graph.objects.iter().filter(|object| object.on.is_empty());
    let roots: Vec<_> = roots.map(ToString::to_string).collect();
    assert_eq!(below(&lines, 0), roots, "{text}");
    for (number, line) in lines.iter().enumerate() {
        let (depth, name) = parts(line);
        let object = graph.objects.iter().find(|object| is_called(name, object));
        let object = object.unwrap_or_else(|| panic!("'{line}' is no object: {text}"));
        assert_eq!(below(&lines[number + 1..], depth + 1), on(graph, object.id), "{line}: {text}");
    }
}

/// How deep a line is, and its object with its PASIDs.
fn parts(line: &str) -> (usize, &str) {
    let text = line.trim_start();
    let depth = (line.len() - text.len()) / 2;
    match text.strip_prefix("← ") {
        Some(name) => (depth, name),
        None => (depth, text),
    }
}

/// What `lines` have at `depth`, up to the first one that is less deep.
fn below(lines: &[&str], depth: usize) -> Vec<String> {
    let lines = lines.iter().map(|line| parts(line));
    let lines = lines.take_while(|(of, _)| *of >= depth).filter(|(of, _)| *of == depth);
    lines.map(|(_, name)| name.to_owned()).collect()
}

fn is_called(name: &str, object: &GraphObject) -> bool {
    let rest = name.strip_prefix(&object.to_string());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(" PASID"))
}

/// The objects that are on `id`, with their PASIDs.
fn on(graph: &ObjectGraph, id: ObjectId) -> Vec<String> {
    let mut all = Vec::new();
    for object in &graph.objects {
        for GraphEdge { pasid, last_pasid, .. } in object.on.iter().filter(|edge| edge.to == id) {
            all.push(match (pasid, last_pasid) {
                (None, _) => object.to_string(),
                (Some(pasid), None) => format!("{object} PASID {pasid:#x}"),
                (Some(first), Some(last)) => format!("{object} PASIDs {first:#x} to {last:#x}"),
            });
        }
    }
    all
}
