use std::path::Path;

use bulkhead_vmm_spec::{BlockBinding, BlockShape, SizeMib};

use super::*;
use crate::testing::{Journaled, shape_and_bindings};

/// Launches what the change makes of a good machine; answers the refusal. No process may have been started.
async fn refusal(change: impl FnOnce(&mut Shape, &mut Bindings)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (mut shape, mut bindings) = shape_and_bindings();
    bindings.share = Some(dir.path().join("share"));
    std::fs::create_dir(dir.path().join("share")).unwrap();
    change(&mut shape, &mut bindings);
    let journal = Journaled::default();
    let launched = Builtin::default().launch_builtin(&shape, &bindings, &journal).await;
    assert!(journal.processes().is_empty(), "{:?}", journal.processes());
    launched.err().expect("it cannot be launched").to_string()
}

#[tokio::test]
async fn what_no_machine_can_be_is_refused_before_anything_starts() {
    let text = refusal(|shape, _| shape.memory = SizeMib(1)).await;
    assert!(text.contains("at least 64 MiB") && text.contains("1 MiB were asked for"), "{text}");
    let text = refusal(|shape, _| shape.share_tag = None).await;
    assert!(text.contains("a tag and a directory"), "{text}");
    let block = BlockShape { serial: "s".into(), read_only: true };
    let text = refusal(|shape, _| shape.blocks.push(block)).await;
    assert!(text.contains("1 block devices on 0 files"), "{text}");
    let text = refusal(|_, bindings| bindings.share = Some("/no/such/share".into())).await;
    assert!(text.starts_with("cannot open share /no/such/share"), "{text}");
}

#[test]
fn files_of_the_wrong_kind_are_named_with_their_role() {
    let text = files::regular("kernel", Path::new("/")).unwrap_err().to_string();
    assert!(text.starts_with("cannot open kernel /") && text.contains("not a regular file"), "{text}");
    let binding = BlockBinding { path: "/dev/null".into() };
    let text = files::disk(&binding.path, true).unwrap_err().to_string();
    assert!(text.contains("neither a regular file nor a block device"), "{text}");
    let net = bulkhead_vmm_spec::NetBinding { tap: "a-name-that-is-too-long".into(), netns: None };
    assert!(crate::network::tap(&net).unwrap_err().to_string().contains("a-name-that-is-too-long"));
}
