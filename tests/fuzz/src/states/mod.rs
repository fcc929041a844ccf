// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a file with a snapshot may contain after someone changed it, decoded from bytes.
//!
//! A snapshot with some of everything is changed here and there, as JSON. What can still be read is
//! restored on a host that may refuse one call. That is refused with an error, and the host blocks
//! everything; or the virtual IOMMU has that very state, and the host was told the decisions in it,
//! and nothing else. Whatever is done next, the host has what the virtual IOMMU says that it has.

mod host;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use serde_json::{json, Value};
use twostage::spec::pci::{Bdf, Pasid};
use twostage::spec::smmuv3::StreamId;
use twostage::viommu::smmuv3::{Smmu, SmmuConfig, SmmuState, StreamPolicy};
use twostage::viommu::vtd::{
    DmaFault, FaultTarget, Policy, RequesterConfig, VtdConfig, VtdIommu, VtdState,
};
use twostage::viommu::Requester;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::models::Quiet;
use host::Host;

/// Size of guest memory, in bytes.
const MEMORY: u64 = 0x1_0000;
/// Where queues are in it.
const QUEUE: u64 = 0x8000;
/// Maximum number of PASIDs of a state: more take too long.
const MAX_PASIDS: u64 = 0x1000;

/// Restores the state that `bytes` stand for.
pub fn run(bytes: &[u8]) {
    let mut input = Input(bytes.iter());
    match input.byte() % 2 {
        0 => vtd(&mut input),
        _ => smmuv3(&mut input),
    }
}

fn vtd(input: &mut Input<'_>) {
    static SNAPSHOT: OnceLock<Value> = OnceLock::new();
    let mut value = SNAPSHOT.get_or_init(vtd_value).clone();
    let changes = input.change(&mut value);
    let state = match serde_json::from_value::<VtdState>(value) {
        Ok(state) => state,
        Err(_) if changes > 0 => return,
        Err(error) => panic!("the snapshot itself is none: {error}"),
    };
    let pasids = state.functions.iter().flat_map(|function| &function.pasids);
    let pasids = pasids.map(|run| u64::from(run.last.saturating_sub(run.first)));
    if pasids.sum::<u64>() > MAX_PASIDS {
        return;
    }
    let host = Host::new(input.byte());
    let restored = VtdIommu::restore(&state, input.memory(), host.clone(), Arc::new(Quiet), None);
    let decided = vtd_decisions(&state).map(|(who, config, _)| (who, config)).collect();
    let unit = match restored {
        Ok(unit) => unit,
        Err(error) => return host.refused(&error, changes > 0, &decided),
    };
    host.restored(&decided);
    assert_eq!(unit.snapshot().expect("it is not halted"), merged(state.clone()));
    for offset in (0..0x1000).step_by(8) {
        unit.mmio_read(offset, &mut [0; 8]);
    }
    let requester = Requester::rid(Bdf::from_raw(8));
    let (address, reason) = (input.number(), None);
    let (write, execute, privileged, stage2) = (true, false, false, false);
    let fault = DmaFault { requester, address, write, execute, privileged, reason, stage2 };
    unit.dma_fault(&fault);
    unit.drain_queue();
    host.has(vtd_decisions(&unit.snapshot().expect("it is not halted")));
    unit.reset().or_else(|_| unit.reset()).expect("the host refuses one call at most");
    let now = unit.snapshot().expect("it is not halted");
    host.has(vtd_decisions(&now));
    // As after power-on, all that has no PASID passes.
    let open = host.open().into_iter().map(|(who, config)| (who, config.policy));
    let functions = state.functions.iter().map(|it| (Requester::rid(it.rid), Policy::Bypass));
    assert!(open.eq(functions), "{:?}", host.open());
    assert_eq!(now.functions.len(), state.functions.len());
}

/// Whom the state has decided about, how, and whether the host has applied that.
fn vtd_decisions(
    state: &VtdState,
) -> impl Iterator<Item = (Requester, RequesterConfig, bool)> + use<'_> {
    state.functions.iter().flat_map(|function| {
        let rid = function.rid;
        let own = function.decision.map(|it| (Requester::rid(rid), it.config, it.applied));
        let pasids = function.pasids.iter().flat_map(move |run| {
            (run.first..=run.last).map(move |pasid| {
                let mut config = run.decision.config;
                config.tag.pasid = pasid;
                (Requester { rid, pasid: Pasid::new(pasid) }, config, run.decision.applied)
            })
        });
        own.into_iter().chain(pasids)
    })
}

/// The same state as a unit says it: neighbours that are decided alike are one run.
fn merged(mut state: VtdState) -> VtdState {
    for function in &mut state.functions {
        function.pasids.dedup_by(|next, run| {
            let mut decision = next.decision;
            // The tag of a PASID is the PASID.
            decision.config.tag.pasid = run.decision.config.tag.pasid;
            let joins = run.last + 1 == next.first && decision == run.decision;
            if joins {
                run.last = next.last;
            }
            joins
        });
    }
    state
}

fn smmuv3(input: &mut Input<'_>) {
    static SNAPSHOT: OnceLock<Value> = OnceLock::new();
    let mut value = SNAPSHOT.get_or_init(smmuv3_value).clone();
    let changes = input.change(&mut value);
    let state = match serde_json::from_value::<SmmuState>(value) {
        Ok(state) => state,
        Err(_) if changes > 0 => return,
        Err(error) => panic!("the snapshot itself is none: {error}"),
    };
    let host = Host::new(input.byte());
    let decided: BTreeMap<_, _> = smmu_decisions(&state).map(|(who, it, _)| (who, it)).collect();
    let smmu = match Smmu::restore(&state, input.memory(), host.clone(), Arc::new(Quiet), None) {
        Ok(smmu) => smmu,
        Err(error) => return host.refused(&error, changes > 0, &decided),
    };
    host.restored(&decided);
    assert_eq!(smmu.snapshot().expect("it is not halted"), state);
    for offset in (0..0x200).chain(0x1_0000..0x1_00d0).step_by(4) {
        smmu.mmio_read(offset, &mut [0; 4]);
    }
    smmu.drain_queue();
    host.has(smmu_decisions(&smmu.snapshot().expect("it is not halted")));
    smmu.reset().or_else(|_| smmu.reset()).expect("the host refuses one call at most");
    let now = smmu.snapshot().expect("it is not halted");
    host.has(smmu_decisions(&now));
    // As after power-on, all passes.
    let streams = state.streams.iter().map(|it| (it.stream, StreamPolicy::GlobalBypass));
    assert!(host.open().into_iter().eq(streams), "{:?}", host.open());
    assert_eq!(now.streams.len(), state.streams.len());
}

/// Whom the state has decided about, how, and whether the host has applied that.
fn smmu_decisions(
    state: &SmmuState,
) -> impl Iterator<Item = (StreamId, StreamPolicy, bool)> + use<'_> {
    state.streams.iter().filter_map(|it| {
        let decision = it.decision?;
        // Whatever is wrong with an entry, nothing passes by it.
        Some((it.stream, decision.policy.unwrap_or(StreamPolicy::Abort), decision.applied))
    })
}

/// A snapshot of a unit with some of everything.
fn vtd_value() -> Value {
    let config = VtdConfig::default()
        .with_pasid_bits(Some(20))
        .with_second_stage(true)
        .with_nest(true)
        .with_device_iotlb(true)
        .with_interrupt_remapping(true);
    let host = Host::new(0);
    let unit =
        VtdIommu::new(&config, memory(), host, Arc::new(Quiet), None).expect("a configuration");
    for rid in [8, 0x10, 0x18] {
        unit.add_device(Bdf::from_raw(rid)).expect("the host accepts it");
    }
    let mut value = serde_json::to_value(unit.snapshot().expect("a snapshot")).expect("JSON");
    let first = |table| {
        json!({ "table": table, "paging_mode": "Level4", "supervisor_requests": false,
            "write_protect": true, "extended_accessed": false })
    };
    let second = json!({ "table": 0x3000, "address_width": "Bits48", "accessed_dirty": true });
    let first_stage = |table| json!({ "Stage1": { "VtdFirstStage": first(table) } });
    let nested = json!({ "Stage1": { "VtdNested": { "first": first(0x1000), "second": second } } });
    let second_stage = json!({ "Stage1": { "VtdSecondStage": second } });
    let decision = |policy, pasid| {
        json!({ "applied": true, "config": { "policy": policy, "fault_disabled": false,
            "tag": { "domain": 1, "pasid": pasid } } })
    };
    let functions = &mut value["functions"];
    functions[0]["decision"] = decision(first_stage(0x1000), 0);
    functions[0]["pasids"] = json!([
        { "first": 1, "last": 4, "decision": decision(first_stage(0x2000), 1) },
        { "first": 6, "last": 6, "decision": decision(first_stage(0x1000), 6) },
        { "first": 7, "last": 8, "decision": decision(nested, 7) },
    ]);
    functions[1]["decision"] = decision(second_stage, 0);
    functions[2]["decision"] = decision(json!({ "Blocked": "ContextNotPresent" }), 0);
    value["interrupt_entries"] = json!([{ "index": 0, "entry": [1, 2] }]);
    // Translation, with tables in scalable mode, the queue with four descriptors, and interrupts.
    let registers = &mut value["registers"];
    registers["gsts"] = json!(0xc700_0000_u32);
    for root in ["rtaddr", "root"] {
        registers[root] = json!(0x4400);
    }
    registers["iqa"] = json!(QUEUE);
    registers["iqt"] = json!(0x40);
    value["translating"] = json!({ "enabled": true, "root": 0x4400 });
    value
}

/// A snapshot of an SMMU with some of everything.
fn smmuv3_value() -> Value {
    let host = Host::new(0);
    let config = SmmuConfig::default();
    let smmu = Smmu::new(&config, memory(), host, Arc::new(Quiet), None).expect("a configuration");
    for stream in [8, 0x10, 0x18] {
        smmu.add_device(StreamId(stream)).expect("the host accepts it");
    }
    let mut value = serde_json::to_value(smmu.snapshot().expect("a snapshot")).expect("JSON");
    let decision = |policy| json!({ "applied": true, "policy": policy });
    let streams = &mut value["streams"];
    let ste = [0x100b, 0];
    streams[0]["decision"] = decision(json!({ "Ok": { "Stage1": { "ste": ste } } }));
    streams[1]["decision"] = decision(json!({ "Ok": "Bypass" }));
    let fault = json!({ "event": "BadSte", "fetch_address": 0, "off": true });
    streams[2]["decision"] = decision(json!({ "Err": fault }));
    // Translation with a linear table, and both queues, with two commands.
    let registers = &mut value["registers"];
    for register in ["cr0", "cr0ack"] {
        registers[register] = json!(0xd);
    }
    registers["strtab_base"] = json!(0x4000);
    registers["strtab_base_cfg"] = json!(6);
    registers["cmdq_base"] = json!(QUEUE | 8);
    registers["cmdq_prod"] = json!(2);
    value["table"] = json!({ "base": 0x4000, "cfg": 6 });
    let events = &mut value["faults"]["events"];
    events["enabled"] = json!(true);
    events["base"] = json!(0x9000 | 8);
    value
}

/// The bytes that are left.
struct Input<'a>(std::slice::Iter<'a, u8>);

impl Input<'_> {
    /// The next byte; 0 after the last.
    fn byte(&mut self) -> u8 {
        self.0.next().copied().unwrap_or_default()
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        usize::from(u16::from_le_bytes([self.byte(), self.byte()])) % end
    }

    /// A small number, an address, a power of two or all bits below one, or any number.
    fn number(&mut self) -> u64 {
        match self.byte() % 8 {
            0..=3 => self.byte().into(),
            4 => 0x1000 * u64::from(self.byte()),
            5 => 1 << (self.byte() % 64),
            6 => u64::MAX >> (self.byte() % 64),
            _ => u64::from_le_bytes(std::array::from_fn(|_| self.byte())),
        }
    }

    /// Changes `value` in up to seven places; returns how many.
    fn change(&mut self, value: &mut Value) -> u8 {
        let changes = self.byte() % 8;
        for _ in 0..changes {
            let count = places(value);
            let copied = place_mut(value, self.below(count)).clone();
            let place = place_mut(value, self.below(count));
            let way = self.byte() % 4;
            match place {
                Value::Number(number) if way > 0 => {
                    let old = number.as_u64().unwrap_or_default();
                    *place = match way {
                        1 => old ^ 1 << (self.byte() % 64),
                        2 => old.wrapping_add_signed(i64::from(self.byte() as i8)),
                        _ => self.number(),
                    }
                    .into();
                }
                Value::Bool(is) if way > 0 => *is = !*is,
                Value::Array(items) if way == 1 && !items.is_empty() => {
                    items.remove(self.below(items.len()));
                }
                Value::Array(items) if way == 2 && !items.is_empty() => {
                    let item = items[self.below(items.len())].clone();
                    items.insert(self.below(items.len()), item);
                }
                place if way == 3 => *place = Value::Null,
                place => *place = copied,
            }
        }
        changes
    }

    /// Guest memory, with some words.
    fn memory(&mut self) -> Arc<GuestMemoryMmap> {
        let memory = memory();
        for _ in 0..self.byte() % 32 {
            let at = match self.byte() {
                at @ ..128 => QUEUE + 8 * u64::from(at),
                _ => self.number() % (MEMORY - 7),
            };
            memory.write_obj(self.number(), GuestAddress(at)).expect("memory");
        }
        memory
    }
}

/// How many values there are: those in `value`, what is in those, and so on, and itself.
fn places(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(places).sum(),
        Value::Object(fields) => fields.values().map(places).sum(),
        _ => 0,
    }
}

/// The one of them with this number. Each comes after what is in it.
fn place_mut(value: &mut Value, mut number: usize) -> &mut Value {
    if number + 1 == places(value) {
        return value;
    }
    let has_it = |part: &&mut Value| {
        let count = places(part);
        let is_there = number < count;
        number -= if is_there { 0 } else { count };
        is_there
    };
    let part = match value {
        Value::Array(items) => items.iter_mut().find(has_it),
        Value::Object(fields) => fields.values_mut().find(has_it),
        _ => None,
    };
    place_mut(part.expect("the number is below that of all places"), number)
}

fn memory() -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).expect("memory"))
}
