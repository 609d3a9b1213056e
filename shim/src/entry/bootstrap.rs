//! What containerd says on standard input of `start`, and how it wants to be answered.
//! Pure but for reading the input; knows both protocols.
//!
//! containerd 2.3 and later writes `BootstrapParams`; earlier ones write the runtime options as an `Any`, or
//! nothing. Both are protobuf and an `Any` decodes as `BootstrapParams` too, so the two are told apart by
//! whether the message names this very shim (contract, S2).

use std::io::{IsTerminal, Read};

use containerd_shim::Flags;
use containerd_shim_protos::{
    bootstrap_api::BootstrapParams,
    protobuf::{Message, well_known_types::any::Any},
};

/// More than any options have, in bytes.
const MAX_INPUT: u64 = 4 << 20;

/// What `start` is told.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Params {
    /// Address of containerd's ttrpc service for events.
    pub(super) ttrpc_address: String,
    /// Where the shim's socket is to lie; containerd's default if None.
    pub(super) socket_dir: Option<String>,
    /// containerd named itself by the new protocol.
    pub(super) named: bool,
    /// The runtime's options: with the sandbox API they come here and nowhere else.
    pub(super) options: Option<Any>,
    /// Log more.
    pub(super) debug: bool,
}

/// Reads standard input to its end.
pub(super) fn read_input() -> Result<Vec<u8>, String> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(Vec::new());
    }
    let mut input = Vec::new();
    stdin.lock().take(MAX_INPUT).read_to_end(&mut input).map_err(|e| format!("read standard input: {e}"))?;
    Ok(input)
}

/// Reads the parameters out of whatever containerd wrote.
pub(super) fn parse(input: &[u8], flags: &Flags, env_address: Option<String>) -> Result<Params, String> {
    let ours = |p: &BootstrapParams| p.instance_id == flags.id && p.namespace == flags.namespace;
    let params = match BootstrapParams::parse_from_bytes(input).ok().filter(ours) {
        Some(p) => Params {
            ttrpc_address: p.containerd_ttrpc_address.clone(),
            socket_dir: p.socket_dir.clone().filter(|d| !d.is_empty()),
            named: true,
            options: p
                .extensions
                .iter()
                .filter_map(|e| e.value.as_ref())
                .find(|any| is_options(any))
                .cloned(),
            debug: flags.debug,
        },
        None => Params {
            ttrpc_address: env_address.unwrap_or_default(),
            socket_dir: None,
            named: false,
            options: Any::parse_from_bytes(input).ok().filter(is_options),
            debug: flags.debug,
        },
    };
    if params.ttrpc_address.is_empty() {
        return Err("containerd's event address is missing: TTRPC_ADDRESS is not set and the bootstrap \
                    parameters name none"
            .into());
    }
    Ok(params)
}

/// The version of the task API to announce.
///
/// 3 where containerd names itself by the new protocol. Else 1.7, which refuses 3, cannot be told from 2.0-2.2
/// by anything it passes, and those serve version 2 in full. But only these have the sandbox API, which needs
/// version 3, and a bundle of that has no config.json (contract, S7).
pub(super) fn version(params: &Params, has_config: bool) -> u32 {
    if params.named || !has_config { 3 } else { 2 }
}

/// containerd's type for the options of any runtime that is not runc.
fn is_options(any: &Any) -> bool {
    any.type_url.ends_with("runtimeoptions.v1.Options")
}

/// Options as the text of an environment variable: hexadecimal digits.
pub(super) fn options_to_env(options: &Any) -> String {
    let bytes = options.write_to_bytes().unwrap_or_default();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The reverse: type name and value.
pub(super) fn options_from_env(text: Option<String>) -> Result<Option<(String, Vec<u8>)>, String> {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
    let broken =
        |why: String| format!("the runtime options that start has handed over cannot be read: {why}");
    let digits = |at| text.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(digits).collect();
    let any = Any::parse_from_bytes(&bytes.ok_or_else(|| broken(text.clone()))?);
    any.map(|any| Some((any.type_url, any.value))).map_err(|e| broken(e.to_string()))
}

/// The answer: JSON, which every containerd since 1.7 reads (contract, S3), without a newline.
pub(super) fn answer(address: &str, version: u32) -> String {
    serde_json::json!({"version": version, "address": address, "protocol": "ttrpc"}).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags() -> Flags {
        Flags { id: "web".into(), namespace: "k8s.io".into(), ..Default::default() }
    }

    #[test]
    fn s2_bootstrap_parameters_are_known_by_their_names() {
        let message = BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/run/c.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        };
        let params = parse(&message.write_to_bytes().unwrap(), &flags(), None).unwrap();
        assert_eq!((version(&params, true), params.ttrpc_address.as_str()), (3, "/run/c.ttrpc"));
        assert_eq!(params.socket_dir.as_deref(), Some("/run/s"));
    }

    #[test]
    fn s2_options_and_nothing_are_the_old_protocol() {
        let any = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: vec![10, 1, 65],
            ..Default::default()
        };
        for input in [any.write_to_bytes().unwrap(), Vec::new()] {
            let params = parse(&input, &flags(), Some("/run/c.ttrpc".into())).unwrap();
            assert_eq!((version(&params, true), params.ttrpc_address.as_str()), (2, "/run/c.ttrpc"));
            assert_eq!(version(&params, false), 3, "the sandbox API");
            assert_eq!(params.options.is_some(), !input.is_empty());
        }
        let handed_over = options_from_env(Some(options_to_env(&any))).unwrap();
        assert_eq!(handed_over, Some((any.type_url, any.value)));
        assert!(options_from_env(Some("0".into())).is_err());
        assert!(parse(&[], &flags(), None).unwrap_err().contains("TTRPC_ADDRESS"));
    }

    #[test]
    fn s3_the_answer_is_json_without_a_newline() {
        let text = answer("unix:///run/s/x", 3);
        assert!(!text.ends_with('\n'));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["version"], 3);
        assert_eq!(value["protocol"], "ttrpc");
    }
}
