use proptest::prelude::*;
use serde_json::json;

use super::*;

const MIB: u64 = 1 << 20;
const SIZING: Sizing = Sizing {
    vcpus: 1,
    memory: SizeMib(1152),
    reserve: SizeMib(128),
    max_vcpus: 4,
    max_memory: SizeMib(8192),
    stated: Limits { memory: None, cpu_millis: None },
    default_memory: SizeMib(1024),
};

fn id(name: &str) -> ContainerId {
    ContainerId::parse(name).unwrap()
}

fn limits(mib: u64, cpu_millis: u64) -> Limits {
    Limits { memory: Some(mib * MIB), cpu_millis: Some(cpu_millis) }
}

fn resources(mib: u64, quota: i64) -> LinuxResources {
    let value = json!({"memory": {"limit": mib * MIB}, "cpu": {"quota": quota, "period": 100_000}});
    serde_json::from_value(value).unwrap()
}

fn size(vcpus: u32, mib: u64) -> Size {
    Size { vcpus, memory: SizeMib(mib) }
}

/// A pod that stated 1024 MiB and two processors for two containers.
fn pod() -> Claims {
    let stated = Limits { memory: Some(1024 * MIB), cpu_millis: Some(2000) };
    let claims = Claims::new(Sizing { vcpus: 2, stated, ..SIZING });
    claims.with(&id("a"), limits(512, 1000)).with(&id("b"), limits(512, 1000))
}

#[test]
fn the_sum_of_the_limits_counts_and_the_default_stays() {
    let claims = Claims::new(SIZING);
    assert_eq!(claims.nearest(), size(1, 1152));
    let claims = claims.with(&id("a"), limits(512, 500));
    assert_eq!(claims.nearest(), size(1, 1152), "it fits into what there is");
    let claims = claims.with(&id("b"), limits(1024, 2000));
    assert_eq!(claims.nearest(), size(3, 1664));
    assert_eq!(claims.without(&id("b")).nearest(), size(1, 1152));
}

#[test]
fn containers_without_a_limit_get_the_default_beside_those_that_have_one() {
    let stated = Limits { memory: Some(100 * MIB), cpu_millis: None };
    let booted = Sizing { memory: SizeMib(228), stated, ..SIZING };
    let claims = Claims::new(booted).with(&id("a"), limits(100, 100));
    assert_eq!(claims.nearest(), size(1, 228));
    let unlimited = Limits { memory: None, ..limits(1, 100) };
    let more = claims.with(&id("b"), unlimited);
    assert_eq!(more.added(&id("b"), claims.nearest()).unwrap(), size(1, 1252));
    assert_eq!(more.with(&id("c"), unlimited).nearest(), size(1, 1252), "once for all of them");
    assert_eq!(more.without(&id("b")).nearest(), size(1, 228));
    // It is no promise: who asks for nothing is not refused for it.
    let small = Claims::new(Sizing { max_memory: SizeMib(300), ..booted }).with(&id("b"), unlimited);
    assert_eq!(small.added(&id("b"), size(1, 228)).unwrap(), size(1, 300));
    // Where nobody has stated anything the default is there already.
    assert_eq!(Claims::new(SIZING).with(&id("b"), unlimited).nearest(), size(1, 1152));
}

#[test]
fn an_update_changes_what_the_pod_has_stated() {
    let claims = pod();
    assert_eq!(claims.nearest(), size(2, 1152));
    let more = claims.updated(&id("a"), &resources(2048, 300_000));
    assert_eq!(more.nearest(), size(4, 2048 + 512 + 128));
    let less = more.updated(&id("a"), &resources(128, 10_000));
    assert_eq!(less.nearest(), size(2, 1152), "the memory of the boot stays; 1.1 processors are two");
    let less = less.updated(&id("b"), &resources(128, 50_000));
    assert_eq!(less.nearest(), size(1, 1152));
    // Nothing that is set is nothing that changes, and -1 takes a limit away.
    assert_eq!(less.updated(&id("b"), &LinuxResources::default()).nearest(), less.nearest());
    let value = json!({"memory": {"limit": -1}, "cpu": {"quota": -1}});
    let free = limits(64, 100).updated(&serde_json::from_value(value).unwrap());
    assert_eq!(free, Limits::default());
}

#[test]
fn what_cannot_be_had_is_refused_with_every_figure() {
    let (claims, a) = (pod(), id("a"));
    let now = claims.nearest();
    let text = |claims: Claims| claims.changed(&a, now).unwrap_err().to_string();
    assert_eq!(
        text(claims.updated(&a, &resources(8192, 100_000))),
        "cannot update container a: its pod would need 8832 MiB of memory, 128 of them for the guest itself, has \
         1152 and can have 8192 at most, by sandbox.max_memory_mib or what the host has"
    );
    assert_eq!(
        text(claims.updated(&a, &resources(512, 400_000))),
        "cannot update container a: its pod would need 5 processors, has 2 and can have 4 at most, by \
         sandbox.max_vcpus and what the host has"
    );
    // A container that is added may be promised more processors than there are, as the first ones are.
    let c = id("c");
    assert_eq!(claims.with(&c, limits(64, 9000)).added(&c, now).unwrap().vcpus, 4);
    assert!(claims.with(&c, limits(8192, 100)).added(&c, now).is_err());
}

#[test]
fn room_for_growth_holds_its_own_descriptions() {
    assert_eq!(SIZING.growth(SizeMib(128)), SizeMib(7168), "7040 MiB and a 63rd");
    assert_eq!(Sizing { max_memory: SizeMib(1152), ..SIZING }.growth(SizeMib(128)), SizeMib(0));
}

proptest! {
    /// Whatever comes, goes and changes: a size is between that of the boot and the most, no smaller than what the
    /// limits add up to unless that is refused, and what has gone leaves nothing.
    #[test]
    fn sizes_hold_the_limits(steps in prop::collection::vec((0..3u8, 0..4usize, 0..6000u64, 1..300i64), 0..30)) {
        let names = ["a", "b", "c", "d"];
        let mut claims = Claims::new(SIZING);
        let mut known: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
        for (what, which, mib, percent) in steps {
            let (name, mib) = (names[which], mib + 1);
            let millis = percent as u64 * 10;
            let next = match what {
                0 => claims.with(&id(name), limits(mib, millis)),
                1 => claims.updated(&id(name), &resources(mib, percent * 1000)),
                _ => claims.without(&id(name)),
            };
            if what == 1 && next.changed(&id(name), claims.nearest()).is_err() {
                continue;
            }
            if what == 2 { known.remove(name); } else { known.insert(name, (mib, millis)); }
            claims = next;
            let now = claims.nearest();
            prop_assert!(now.memory >= SIZING.memory && now.memory <= SIZING.max_memory);
            prop_assert!(now.vcpus >= SIZING.vcpus && now.vcpus <= SIZING.max_vcpus);
            let memory: u64 = known.values().map(|k| k.0).sum();
            let cpus = known.values().map(|k| k.1).sum::<u64>().div_ceil(1000);
            prop_assert!(now.memory.0 >= (memory + SIZING.reserve.0).min(SIZING.max_memory.0));
            prop_assert!(u64::from(now.vcpus) >= cpus.min(SIZING.max_vcpus.into()));
        }
        for name in names {
            claims = claims.without(&id(name));
        }
        prop_assert_eq!(claims.nearest(), size(1, 1152));
    }
}
