// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each call of a scenario fails in turn: what was created before can be removed, and nothing is
//! left.

use super::fake::{memory, s1, Bench, PARENT, PASID};
use super::viommus::KIND;
use twostage::iommufd::{
    Errno, FailNth, HostIommu, HwptAlloc, HwptData, InvalidateData, MapTarget, ObjectId,
    Protection, Result, ViommuKind,
};

/// What was created, to be removed in reverse order.
#[derive(Default)]
struct Made {
    objects: Vec<ObjectId>,
    attached: Vec<(ObjectId, Option<u32>)>,
    devices: Vec<ObjectId>,
}

fn set_up(host: &dyn HostIommu, made: &mut Made) -> Result<()> {
    let dev = host.device_bind("a")?;
    made.devices.push(dev);
    let ioas = host.ioas_alloc()?;
    made.objects.push(ioas);
    let target = MapTarget::Fixed(0);
    host.ioas_map(ioas, &memory(0x4000), target, Protection::READ_WRITE)?;
    host.get_hw_info(dev)?;
    let parent = PARENT.with_pasid(true);
    let args = HwptAlloc { flags: parent, dev, pt: ioas, data: HwptData::None, fault: None };
    let parent = host.hwpt_alloc(&args)?;
    made.objects.push(parent);
    host.device_attach(dev, None, parent)?;
    made.attached.push((dev, None));
    // Closed when the set-up ends.
    let faults = host.fault_queue_alloc()?;
    made.objects.push(faults.object());
    let viommu = host.viommu_alloc(ViommuKind::ArmSmmuV3, dev, parent)?;
    made.objects.push(viommu);
    made.objects.push(host.vdevice_alloc(viommu, dev, 1)?);
    let events = host.veventq_alloc(viommu, KIND, 4)?;
    made.objects.push(events.object());
    let data = HwptData::VtdS1(s1(0x1000));
    let (flags, fault) = (PASID.with_fault_id_valid(true), Some(faults.object()));
    let nested = host.hwpt_alloc(&HwptAlloc { flags, dev, pt: viommu, data, fault })?;
    made.objects.push(nested);
    host.device_attach(dev, Some(1), nested)?;
    made.attached.push((dev, Some(1)));
    host.device_attach(dev, None, nested)?;
    host.hwpt_invalidate(nested, InvalidateData::VtdS1(&[])).map_err(|error| error.error)?;
    host.ioas_unmap(ioas, 0, 0x4000)?;
    Ok(())
}

fn take_apart(host: &dyn HostIommu, made: &Made) {
    for (dev, slot) in made.attached.iter().rev() {
        host.device_detach(*dev, *slot).unwrap();
    }
    for object in made.objects.iter().rev() {
        host.destroy(*object).unwrap();
    }
    for dev in &made.devices {
        host.device_unbind(*dev).unwrap();
    }
}

#[test]
fn whichever_call_fails_nothing_leaks() {
    let mut failures = 0;
    for nth in 1.. {
        let bench = Bench::with_viommus();
        let host = FailNth::new(bench.host.clone());
        host.fail_nth(nth, Errno::ENOMEM);
        let mut made = Made::default();
        let outcome = set_up(&host, &mut made);
        if host.is_armed() {
            outcome.unwrap();
            break;
        }
        assert_eq!(outcome.unwrap_err().errno, Errno::ENOMEM);
        failures += 1;
        take_apart(&host, &made);
        assert_eq!(bench.host.live_objects(), 0, "call {nth}");
        assert_eq!(bench.host.pinned_bytes(), 0, "call {nth}");
    }
    assert_eq!(failures, 15);
}
