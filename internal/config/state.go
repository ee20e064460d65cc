package config

import (
	"encoding/json"
	"fmt"
	"reflect"
)

// MarshalState is the entry as [ParseBlobEntry] reads it back, with its secrets: for a
// file or a socket that only root reads.
func (e BlobEntry) MarshalState() ([]byte, error) {
	image := e.Image
	prefetch := map[string]any{}
	stateMembers(reflect.ValueOf(image.Prefetch), prefetch)
	if image.Prefetch.Threads == 0 {
		delete(prefetch, "threads") // nydus's form has no 0 for the daemon's choice
	}
	v2 := map[string]any{
		"version":       2,
		"id":            image.ID,
		"backend":       state(reflect.ValueOf(image.Backend)),
		"cache":         map[string]any{"type": "fscache", "prefetch": prefetch, "fscache": workDir(image.WorkDir)},
		"metadata_path": e.Bootstrap,
	}
	if image.Amplify != nil {
		v2["rafs"] = map[string]any{"batch_size": int64(*image.Amplify)}
	}
	text, err := json.Marshal(map[string]any{"type": e.Type, "id": e.ID, "domain_id": e.DomainID, "config_v2": v2})
	if err != nil {
		return nil, fmt.Errorf("encode blob entry: %w", err)
	}
	return text, nil
}

func workDir(dir string) map[string]any {
	if dir == "" {
		return map[string]any{}
	}
	return map[string]any{"work_dir": dir}
}

// state is v as nydus's v2 form has it, secrets in the clear: the inverse of decoder.value.
func state(v reflect.Value) any {
	switch x := v.Interface().(type) {
	case Secret:
		return x.Reveal()
	case Size:
		return int64(x)
	case Duration:
		if x%1e9 != 0 {
			return x.String() // only our own form has it
		}
		return int64(x / 1e9)
	}
	switch v.Kind() {
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return state(v.Elem())
	case reflect.Struct:
		members := map[string]any{}
		stateMembers(v, members)
		return members
	case reflect.Slice:
		list := make([]any, v.Len())
		for i := range list {
			list[i] = state(v.Index(i))
		}
		return list
	case reflect.Map:
		members := map[string]any{}
		for it := v.MapRange(); it.Next(); {
			members[it.Key().String()] = state(it.Value())
		}
		return members
	}
	return v.Interface()
}

func stateMembers(v reflect.Value, members map[string]any) {
	d := decoder{}
	for i := range v.NumField() {
		field := v.Type().Field(i)
		if field.Anonymous {
			stateMembers(v.Field(i), members)
		} else if key, _ := d.key(field); key != "-" {
			members[key] = state(v.Field(i))
		}
	}
}
