package main

import (
	"encoding/json"
	"fmt"
	"os"
)

// readTemplate reads a configuration of nydus's. nydus-snapshotter's form of it for fscache,
// with config.backend_type, becomes version 1, which says the same.
func readTemplate(name string) ([]byte, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read backend.template: %w", err)
	}
	var fscache struct {
		Config *struct {
			Type     string         `json:"backend_type"`
			Backend  map[string]any `json:"backend_config"`
			Prefetch map[string]any `json:"prefetch_config"`
		} `json:"config"`
	}
	err = json.Unmarshal(text, &fscache)
	if err != nil || fscache.Config == nil || fscache.Config.Type == "" {
		return text, nil // it is another form, or the caller finds out what is wrong
	}
	backend := object{"type": fscache.Config.Type, "config": fscache.Config.Backend}
	v1 := object{"device": object{"backend": backend, "cache": object{"type": "blobcache"}}, "mode": "direct"}
	if fscache.Config.Prefetch != nil {
		v1["fs_prefetch"] = fscache.Config.Prefetch
	}
	return json.Marshal(v1)
}
