package nydusd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/erofsd/erofsd/internal/api"
)

// object is a part of one of nydus's configurations.
type object = map[string]any

// An origin is where the data of an image come from.
type origin struct {
	kind     string // of backend
	backend  object // its keys, with the login
	prefetch prefetch
}

// prefetch is what nydusd fetches before somebody reads it; it wants every key.
type prefetch struct {
	Enable    bool  `json:"enable"`
	Threads   int   `json:"threads_count"`
	BatchSize int64 `json:"merging_size"`
	Bandwidth int64 `json:"bandwidth_rate"`
	All       bool  `json:"prefetch_all"`
}

// A document is nydus's configuration, of either version.
type document struct {
	Device *struct { // version 1
		Backend struct {
			Type   string `json:"type"`
			Config object `json:"config"`
		} `json:"backend"`
	} `json:"device"`
	Prefetch prefetch `json:"fs_prefetch"`

	Backend object `json:"backend"` // version 2
	Cache   struct {
		Prefetch struct {
			Enable    bool  `json:"enable"`
			Threads   int   `json:"threads"`
			BatchSize int64 `json:"batch_size"`
			Bandwidth int64 `json:"bandwidth_limit"`
			All       bool  `json:"prefetch_all"`
		} `json:"prefetch"`
	} `json:"cache"`
}

var errConfig = api.BadRequest(errors.New("the image's configuration is none that nydusd could be told: write backend.template as nydus's JSON, version 1 or 2, with the type of the backend"))

// parseOrigin reads a configuration. The error has nothing of the text: there may be a login
// in it.
func parseOrigin(text json.RawMessage) (origin, error) {
	var d document
	if err := json.Unmarshal(text, &d); err != nil {
		return origin{}, errConfig
	}
	p := d.Cache.Prefetch
	o := origin{prefetch: prefetch{p.Enable, p.Threads, p.BatchSize, p.Bandwidth, p.All}}
	if d.Device != nil {
		o.kind, o.backend, o.prefetch = d.Device.Backend.Type, d.Device.Backend.Config, d.Prefetch
	} else {
		o.kind, _ = d.Backend["type"].(string)
		o.backend, _ = d.Backend[o.kind].(object)
	}
	if o.kind == "" || o.backend == nil {
		return origin{}, errConfig
	}
	o.prefetch.Threads = cmp.Or(o.prefetch.Threads, 8)                // nydusd's own defaults,
	o.prefetch.BatchSize = cmp.Or(o.prefetch.BatchSize, int64(1<<20)) // which its older form does not know
	return o, nil
}

// A Login finds the login for a registry in docker's configuration: base64 of user:password,
// or a token; both are empty where there is none.
type Login func(ctx context.Context, host string) (auth, token string, err error)

// settle makes of what only erofsd understands what nydusd does.
func (o *origin) settle(ctx context.Context, login Login) error {
	if o.kind != "registry" {
		return nil
	}
	host, _ := o.backend["host"].(string)
	if o.backend["credentials"] == "docker" && o.backend["auth"] == nil && o.backend["registry_token"] == nil && login != nil {
		auth, token, err := login(ctx, host)
		switch {
		case err != nil:
			return fmt.Errorf("ask docker for the login of %s: %w", host, err)
		case auth != "":
			o.backend["auth"] = auth
		case token != "":
			o.backend["registry_token"] = token
		}
	}
	delete(o.backend, "credentials")
	delete(o.backend, "hosts_dir")
	if host == "docker.io" {
		o.backend["host"] = "index.docker.io" // docker.io itself answers no blobs
	}
	return nil
}

// auth is the login that nydusd can be given anew; "": none.
func (o origin) auth() string {
	auth, _ := o.backend["auth"].(string)
	return auth
}

// secrets are what of the backend's keys nobody is told.
func (o origin) secrets() (list []string) {
	for _, key := range []string{"auth", "registry_token", "access_key_id", "access_key_secret"} {
		if s, _ := o.backend[key].(string); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// entry is what makes an image known to a nydusd with fscache, as nydus-snapshotter says it.
func (o origin) entry(i image, bootstrap, work string) object {
	config := object{
		"id": i.FSID, "backend_type": o.kind, "backend_config": o.backend,
		"cache_type": "fscache", "cache_config": object{"work_dir": work}, "metadata_path": bootstrap,
	}
	if o.prefetch.Enable {
		config["prefetch_config"] = o.prefetch
	}
	return object{"type": "bootstrap", "id": i.FSID, "domain_id": i.Domain, "config": config}
}

// mount is the configuration of an image that a nydusd with FUSE mounts.
func (o origin) mount(i image, work string) (string, error) {
	text, err := json.Marshal(object{
		"device": object{
			"id":      i.FSID,
			"backend": object{"type": o.kind, "config": o.backend},
			"cache":   object{"type": "blobcache", "config": object{"work_dir": work}},
		},
		"mode": "direct", "digest_validate": false, "iostats_files": false, "enable_xattr": true,
		"fs_prefetch": o.prefetch,
	})
	return string(text), err
}
