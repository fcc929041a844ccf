// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The objects of an iommufd as a graph, and its text.

use std::collections::BTreeSet;

use twostage_emulated::{EmulatedHost, ObjectGraph};

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

/// The text has each object below each one that it is on, and says how many there are.
pub fn check_text(graph: &ObjectGraph) {
    let text = graph.to_string();
    for object in &graph.objects {
        let name = object.to_string();
        let lines = text.lines().filter(|line| line.contains(&name)).count();
        let on: BTreeSet<_> = object.on.iter().map(|edge| edge.to).collect();
        assert!(lines >= on.len().max(1), "{name} is not everywhere: {text}");
    }
    let (objects, bytes) = (graph.objects.len(), graph.pinned_bytes);
    let end = format!("{objects} objects, {bytes:#x} bytes pinned\n");
    assert!(text.ends_with(&end), "{text}");
}
