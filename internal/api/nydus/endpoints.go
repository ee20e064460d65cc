package nydus

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
)

func (h handler) daemon(s Service) {
	h.on(http.MethodGet, "/api/v1/daemon", endpoint{name: "DaemonInfo", call: func(*request) (any, error) {
		return s.Info(), nil
	}})
	h.on(http.MethodGet, "/api/v2/daemon", endpoint{name: "DaemonInfo", call: func(*request) (any, error) {
		info := s.Info()
		info.Backends = nil
		return info, nil
	}})
	level := endpoint{name: "Configure", body: true, call: func(r *request) (any, error) { return no{}, setLevel(s, r) }}
	h.on(http.MethodPut, "/api/v1/daemon", level)
	h.on(http.MethodPut, "/api/v2/daemon", level)
	h.on(http.MethodGet, "/api/v1/daemon/events", endpoint{name: "Events", call: func(*request) (any, error) {
		e := s.Events()
		e.Errors = list(e.Errors)
		return e, nil
	}})
	h.on(http.MethodPut, "/api/v1/daemon/start", event("Configure", s.Start))
	h.on(http.MethodPut, "/api/v1/daemon/exit", event("Configure", s.Exit))
	h.on(http.MethodPut, "/api/v1/daemon/fuse/sendfd", event("Upgrade", s.SendFD))
	h.on(http.MethodPut, "/api/v1/daemon/fuse/takeover", event("Upgrade", s.TakeOver))
	h.on(http.MethodGet, "/api/v1/config", endpoint{name: "Configure", call: func(r *request) (any, error) {
		values, err := s.Config(r.value("id"))
		if values == nil {
			values = map[string]string{}
		}
		return values, err
	}})
	h.on(http.MethodPut, "/api/v1/config", endpoint{name: "Configure", body: true, call: func(r *request) (any, error) {
		return no{}, setConfig(s, r)
	}})
}

// event is an endpoint that does the one thing do.
func event(name string, do func(context.Context) error) endpoint {
	return endpoint{name: name, call: func(r *request) (any, error) { return no{}, do(r.Context()) }}
}

func setLevel(s Service, r *request) error {
	var c struct {
		Level *string `json:"log_level"`
	}
	if err := r.decode(&c); err != nil {
		return err
	}
	if c.Level == nil {
		return r.missing("log_level")
	}
	level := strings.ToLower(*c.Level)
	if !slices.Contains([]string{"off", "error", "warn", "info", "debug", "trace"}, level) {
		err := errors.New("log_level: want off, error, warn, info, debug or trace")
		return &Error{Status: http.StatusInternalServerError, Words: "ResponsePayloadType", Cause: err}
	}
	return s.SetLogLevel(level)
}

func setConfig(s Service, r *request) error {
	var c map[string]*string
	if err := r.decode(&c); err != nil {
		return err
	}
	values := make(map[string]string, len(c))
	for key, v := range c {
		if v == nil {
			return r.parseError("invalid type: null, expected a string", len(r.body))
		}
		if !slices.Contains(ConfigKeys(), key) {
			return Invalid(errors.New("only these keys can be changed: " + strings.Join(ConfigKeys(), ", ")))
		}
		values[key] = *v
	}
	return s.SetConfig(r.Context(), r.value("id"), values)
}

func (h handler) mounts(s Service) {
	h.on(http.MethodGet, "/api/v1/daemon/backend", endpoint{name: "FsBackendInfo", call: func(r *request) (any, error) {
		mountpoint, err := r.need("mountpoint")
		if err != nil {
			return nil, err
		}
		return answer(s.Superblock(r.Context(), mountpoint))
	}})
	h.on(http.MethodPost, "/api/v1/mount", mount(s.Mount))
	h.on(http.MethodPut, "/api/v1/mount", mount(s.Remount))
	h.on(http.MethodDelete, "/api/v1/mount", endpoint{name: "Mount", call: func(r *request) (any, error) {
		mountpoint, err := r.need("mountpoint")
		if err != nil {
			return nil, err
		}
		return no{}, s.Unmount(r.Context(), mountpoint)
	}})
}

// mount is an endpoint that does do with a mount point and a command.
func mount(do func(context.Context, string, MountCommand) error) endpoint {
	return endpoint{name: "Mount", body: true, call: func(r *request) (any, error) {
		mountpoint, err := r.need("mountpoint")
		if err != nil {
			return nil, err
		}
		c, err := r.mountCommand()
		if err != nil {
			return nil, err
		}
		return no{}, do(r.Context(), mountpoint, c)
	}}
}

// A mountBody is a [MountCommand] as it is sent.
type mountBody struct {
	Source        *string  `json:"source"`
	Type          string   `json:"fs_type"`
	Config        *string  `json:"config"`
	PrefetchFiles []string `json:"prefetch_files"`
}

// mountCommand reads the body of a mount.
func (r *request) mountCommand() (MountCommand, error) {
	var c mountBody
	if err := r.decode(&c); err != nil {
		return MountCommand{}, err
	}
	switch {
	case c.Source == nil:
		return MountCommand{}, r.missing("source")
	case c.Config == nil:
		return MountCommand{}, r.missing("config")
	}
	m := MountCommand{Source: *c.Source, Config: *c.Config, PrefetchFiles: c.PrefetchFiles}
	switch c.Type {
	case "rafs":
		m.Type = Rafs
	case "passthrough", "passthroughfs", "passthrough_fs":
		m.Type = Passthrough
	default:
		return MountCommand{}, MountFailed(errors.New(
			"invalid argument `only 'rafs' and 'passthrough_fs' are supported, fs_type is neither`"))
	}
	return m, nil
}

func (h handler) blobs(s Service) {
	const path = "/api/v2/blobs"
	h.on(http.MethodGet, path, endpoint{name: "GetBlobObjects", call: func(r *request) (any, error) {
		domain, given := r.query("domain_id")
		if !given {
			return nil, BadRequest(errors.New("'domain_id' should be specified in query string; it may be empty"))
		}
		blobs, err := s.Blobs(r.Context(), domain, r.value("blob_id"))
		return list(blobs), err
	}})
	h.on(http.MethodPut, path, endpoint{name: "CreateBlobObject", body: true, call: func(r *request) (any, error) {
		return no{}, s.PutBlob(r.Context(), r.body)
	}})
	h.on(http.MethodDelete, path, endpoint{name: "DeleteBlobObject", call: func(r *request) (any, error) {
		domain, given := r.query("domain_id")
		blob := r.value("blob_id")
		switch {
		case given:
			return no{}, s.DeleteBlob(r.Context(), domain, blob)
		case blob != "":
			r.name = "DeleteBlobFile" // without a domain it is the cache file that goes
			return no{}, s.CullBlob(r.Context(), blob)
		}
		return nil, BadRequest(errors.New("'domain_id' or 'blob_id' should be specified in query string"))
	}})
}

func (h handler) metrics(s Service) {
	get := func(path, name string, call func(r *request) (any, error)) {
		h.on(http.MethodGet, "/api/v1/metrics"+path, endpoint{name: name, call: call})
	}
	get("", "GlobalMetrics", func(r *request) (any, error) { return answer(s.FsStats(r.value("id"))) })
	get("/files", "FsFilesMetrics", func(r *request) (any, error) {
		latest := r.value("latest") == "true"
		files, err := s.FsFiles(r.value("id"), latest)
		if latest {
			return list(files.Latest), err
		}
		return byInode(files.Counters), err
	})
	get("/pattern", "Pattern", func(r *request) (any, error) {
		files, err := s.FsPattern(r.value("id"))
		return list(files), err
	})
	get("/inflight", "InflightMetrics", func(*request) (any, error) {
		requests, err := s.Inflight()
		if len(requests) == 0 {
			return no{}, err
		}
		return requests, err
	})
	get("/backend", "BackendMetrics", func(r *request) (any, error) { return answer(s.BackendMetrics(r.value("id"))) })
	get("/blobcache", "BlobcacheMetrics", func(r *request) (any, error) {
		m, err := s.CacheMetrics(r.value("id"))
		m.Files = list(m.Files)
		return m, err
	})
}

// answer is a typed answer as an untyped one.
func answer[T any](v T, err error) (any, error) { return v, err }

// list is s, which is never null in JSON.
func list[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// byInode is m, which is never null in JSON.
func byInode(m map[uint64]FileStats) map[uint64]FileStats {
	if m == nil {
		return map[uint64]FileStats{}
	}
	return m
}
