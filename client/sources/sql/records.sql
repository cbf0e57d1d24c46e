-- Records of the members from {first} to {last} days after the index date.
SELECT
    CAST(c.subject_id AS VARCHAR) AS patient,
    CAST(c.index_date AS VARCHAR) AS index_date,
    CAST(CAST(e.{date} AS DATE) AS VARCHAR) AS day,
    CAST(CAST(e.{date}time AS TIMESTAMP) AS VARCHAR) AS moment,
    CAST(e.{concept} AS VARCHAR) AS concept,
    CAST({value} AS VARCHAR) AS value,
    CAST({unit_concept} AS VARCHAR) AS unit_concept,
    CAST({unit} AS VARCHAR) AS unit
FROM (
    SELECT DISTINCT subject_id, CAST(cohort_start_date AS DATE) AS index_date
    FROM cohort
    WHERE cohort_definition_id = {cohort}
) c
JOIN {table} e ON e.person_id = c.subject_id
WHERE CAST(e.{date} AS DATE) BETWEEN c.index_date + ({first}) AND c.index_date + ({last})
    AND ({every} = 1 OR e.{concept} IN ({concepts}))
