//! Lays values from containerd's runtime options and from a pod's annotations over a configuration.

use std::collections::HashMap;

use protobuf::CodedInputStream;
use protobuf::rt::WireType;
use protobuf::well_known_types::any::Any;
use toml::{Table, Value};

use super::error::{ConfigError, Place};
use super::schema::{self, KEYS, Key, Kind};
use super::text::{self, Extra};
use super::{Config, MINIMUM_GUEST_MEMORY_MIB, Source};

/// What every annotation of ours begins with; the rest is a key.
pub const ANNOTATION_PREFIX: &str = "io.bulkhead.";

/// containerd's type for the options of any runtime that is not runc (api/types/runtimeoptions/v1/api.proto).
const OPTIONS_TYPE: &str = "runtimeoptions.v1.Options";

impl Config {
    /// Applies the options that containerd passes for a runtime: a path replaces what was read before, a table
    /// is laid over it. Options of other types, such as runc's, are not ours and change nothing.
    ///
    /// # Errors
    /// Options that cannot be decoded, and what [`Config::load`] refuses.
    pub fn with_runtime_options(self, options: &Any) -> Result<Self, ConfigError> {
        let kind = options.type_url.rsplit('/').next().unwrap_or_default();
        if kind != OPTIONS_TYPE && !kind.ends_with(&format!(".{OPTIONS_TYPE}")) {
            if !kind.is_empty() {
                tracing::info!(type_url = %options.type_url, "runtime options of this type are not for bulkhead: ignored");
            }
            return Ok(self);
        }
        let RuntimeOptions { config_path, config_body } = RuntimeOptions::decode(options)?;
        if !config_path.is_empty() {
            return Self::load_from(&Source::Explicit(config_path.into()));
        }
        let origin = "runtime options of containerd";
        let body = std::str::from_utf8(&config_body).map_err(|error| ConfigError::Options {
            type_url: options.type_url.clone(),
            message: format!("config_body: {error}"),
        })?;
        self.overlaid(text::parse(body, origin, Extra::Containerd)?, origin)
    }

    /// Applies the annotations that begin with [`ANNOTATION_PREFIX`].
    ///
    /// # Errors
    /// An annotation that names no key, or one that the administrator has not allowed, or a value that the key
    /// does not take.
    pub fn with_annotations(self, annotations: &HashMap<String, String>) -> Result<Self, ConfigError> {
        let mut ours: Vec<_> = annotations
            .iter()
            .filter_map(|(name, value)| Some((name, name.strip_prefix(ANNOTATION_PREFIX)?, value)))
            .collect();
        if ours.is_empty() {
            return Ok(self);
        }
        // A map has no order; the same pod must get the same message each time.
        ours.sort();
        let mut overlay = Table::new();
        for (annotation, name, value) in ours {
            let key = allowed_key(annotation, name, &self.annotations.allowed)?;
            let place = Place { origin: format!("annotation `{annotation}`"), position: None };
            let value = typed(key, value, &place)?;
            key.check(&value, &place)?;
            match key.name.split_once('.') {
                None => overlay.insert(key.name.into(), value),
                Some((section, rest)) => overlay
                    .entry(section)
                    .or_insert_with(|| Value::Table(Table::new()))
                    .as_table_mut()
                    .and_then(|table| table.insert(rest.into(), value)),
            };
        }
        self.overlaid(overlay, "annotations of the pod")
    }

    /// Lays checked values over this configuration.
    pub(super) fn overlaid(self, overlay: Table, origin: &str) -> Result<Self, ConfigError> {
        let unexpected = |message: String| ConfigError::Syntax {
            place: Place { origin: origin.to_owned(), position: None },
            message,
        };
        let mut merged = Table::try_from(&self).map_err(|error| unexpected(error.to_string()))?;
        for (name, value) in overlay {
            match (merged.get_mut(&name), value) {
                (Some(Value::Table(section)), Value::Table(values)) => section.extend(values),
                (_, value) => {
                    merged.insert(name, value);
                }
            }
        }
        let config: Self =
            merged.try_into().map_err(|error: toml::de::Error| unexpected(error.message().into()))?;
        let total = config.sandbox.memory_mib + config.sandbox.memory_reserve_mib;
        if total < MINIMUM_GUEST_MEMORY_MIB {
            let (origin, minimum) = (origin.to_owned(), MINIMUM_GUEST_MEMORY_MIB);
            return Err(ConfigError::TooLittleMemory { origin, total, minimum });
        }
        Ok(config)
    }
}

fn allowed_key(annotation: &str, name: &str, allowed: &[String]) -> Result<&'static Key, ConfigError> {
    let unknown = |advice| ConfigError::UnknownAnnotation { annotation: annotation.to_owned(), advice };
    let Some(key) = schema::find(name) else {
        let known = KEYS.iter().filter(|key| key.per_pod).map(|key| key.name);
        return Err(unknown(match schema::nearest(name, known.clone()) {
            Some(near) => format!("no such key; did you mean `{ANNOTATION_PREFIX}{near}`?"),
            None => {
                let known: Vec<_> = known.map(|name| format!("`{ANNOTATION_PREFIX}{name}`")).collect();
                format!("no such key; there are {}", known.join(", "))
            }
        }));
    };
    if !key.per_pod {
        return Err(unknown(format!("the key `{name}` belongs to the host; no pod can set it")));
    }
    if !allowed.iter().any(|allowed| allowed == name) {
        return Err(ConfigError::AnnotationNotAllowed {
            annotation: annotation.to_owned(),
            key: name.to_owned(),
        });
    }
    Ok(key)
}

/// An annotation's text as the type that its key takes.
fn typed(key: &Key, text: &str, place: &Place) -> Result<Value, ConfigError> {
    match key.kind {
        Kind::Integer(..) => {
            text.parse().map(Value::Integer).map_err(|_| key.wrong_type(&format!("{:?}", text), place))
        }
        Kind::Switch => {
            text.parse().map(Value::Boolean).map_err(|_| key.wrong_type(&format!("{:?}", text), place))
        }
        _ => Ok(Value::String(text.to_owned())),
    }
}

/// The fields of `runtimeoptions.v1.Options` that we use. The message has three fields and comes from no crate
/// that we have, so it is read field by field.
#[derive(Default)]
struct RuntimeOptions {
    config_path: String,
    config_body: Vec<u8>,
}

impl RuntimeOptions {
    fn decode(any: &Any) -> Result<Self, ConfigError> {
        Self::read(&mut CodedInputStream::from_bytes(&any.value)).map_err(|error| ConfigError::Options {
            type_url: any.type_url.clone(),
            message: error.to_string(),
        })
    }

    fn read(input: &mut CodedInputStream<'_>) -> protobuf::Result<Self> {
        const CONFIG_PATH: u32 = 2 << 3 | WireType::LengthDelimited as u32;
        const CONFIG_BODY: u32 = 3 << 3 | WireType::LengthDelimited as u32;
        let mut options = Self::default();
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                CONFIG_PATH => options.config_path = input.read_string()?,
                CONFIG_BODY => options.config_body = input.read_bytes()?,
                other => match WireType::new(other & 7) {
                    Some(kind) => input.skip_field(kind)?,
                    None => return Err(std::io::Error::other(format!("tag {other} has no wire type")).into()),
                },
            }
        }
        Ok(options)
    }
}
